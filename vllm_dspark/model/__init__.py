"""The drafter in plain torch: what training, evaluation and the tests run.

It knows nothing of vLLM, whose model class computes the same numbers on paged caches.
"""
