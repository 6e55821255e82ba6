"""The judge: a language model that grades answers or says which of two is better, and what to make of its word.

    questions, answers -> requests (prompts) -> replies (client, book) -> judgments (verdicts) -> figures

Judgments are the record, in FastChat's JSONL formats; every figure is computed from them (`tunesmith judge --replay`).
"""
