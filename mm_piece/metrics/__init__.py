"""Metrics: scores of answers, and numbers of an accuracy matrix. Pure functions.

answers        the table of metrics: one line to add one
overlap        exact, rouge-l, edit, bleu, cider
vqa            the soft accuracy of VQA v2
choice         the option that an answer names
choice_labels  the letters of options in a text
choice_cues    the words by which a text names an option
words          texts as words, without case, punctuation and articles
continual      OP, BWT, forgetting, FWT
intervals      confidence intervals over seeds
"""
