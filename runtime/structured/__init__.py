"""Answers of a given form: grammars, and which tokens may follow by them."""
