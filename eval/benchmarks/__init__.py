"""Speed and memory of the operator, of converted models and of the conversion itself: `python -m eval.benchmarks`."""
