"""Metrics: scores of answers, and numbers of an accuracy matrix. Pure functions.

answers        the table of metrics: one line to add one
overlap        exact, rouge-l, edit, bleu, cider
vqa            the soft accuracy of VQA v2
choice         the option that an answer names (choice_cues: its words, choice_labels: its letters)
words          what is compared where case, marks and articles say nothing
continual      OP, BWT, forgetting, FWT
intervals      confidence intervals over seeds
"""
