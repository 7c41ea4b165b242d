"""LongTimeScope: TimeScope with videos of five to ten hours."""

from videonsa_jax.evaluation.benchmarks import timescope
from videonsa_jax.evaluation.benchmarks.letters import ANSWER_PHRASES

# LMMs-Eval lacks two commas here, which glue four phrases to two that no model says. So "Best
# option: C" is B there. Kept, since published scores were made so.
_PHRASES = (
    *ANSWER_PHRASES[:4],
    "The best option isThe correct option is",
    "Best answer:Best option:",
)

LONGTIMESCOPE = timescope.benchmark(
    shortest=18000, longest=36000, version="first_letter_a_to_f_glued_phrases.1", phrases=_PHRASES
)
