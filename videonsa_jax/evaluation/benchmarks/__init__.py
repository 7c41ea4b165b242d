"""The six benchmarks of the paper by name, one file each."""

from videonsa_jax.evaluation.benchmarks.benchmark import Benchmark
from videonsa_jax.evaluation.benchmarks.longtimescope import LONGTIMESCOPE
from videonsa_jax.evaluation.benchmarks.longvideobench import LONGVIDEOBENCH
from videonsa_jax.evaluation.benchmarks.mlvu import MLVU
from videonsa_jax.evaluation.benchmarks.timescope import TIMESCOPE
from videonsa_jax.evaluation.benchmarks.tomato import TOMATO
from videonsa_jax.evaluation.benchmarks.vsibench import VSIBENCH

BENCHMARKS: dict[str, Benchmark] = {
    "longvideobench": LONGVIDEOBENCH,
    "mlvu": MLVU,
    "timescope": TIMESCOPE,
    "longtimescope": LONGTIMESCOPE,
    "tomato": TOMATO,
    "vsibench": VSIBENCH,
}
