"""Holds pure functions on tensors: divergences, log-probs, estimators, advantages."""
