"""Evaluation by generated answers: tasks, scoring, and the runner."""
