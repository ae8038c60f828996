"""Evaluation: a model's answers on tasks, and how far it went from its base.

answers        greedy answers and their scores: one row of the accuracy matrix
matrix         that row for a store's recipe, at a position
divergence     Kullback-Leibler divergence from the base
suites/        harnesses that others keep: lm-eval, lmms-eval
"""
