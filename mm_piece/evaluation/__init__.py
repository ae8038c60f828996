"""Evaluation: a model's answers on tasks, and how far it has gone from its base.

answers        greedy answers to examples, and their scores
chosen_tasks   the tasks of a store that are asked for by name
matrix         the mean scores of all tasks at a position: one row of the accuracy matrix
divergence     Kullback-Leibler divergence from the base
suites/        harnesses of others: lm-eval, lmms-eval
"""
