"""Softmax attention under one kind of mask, by every backend: the loop of all branches but one."""
