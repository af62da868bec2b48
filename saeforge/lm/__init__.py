"""Language models: load them, name their sites, pack tokens, capture activations.

The only room that imports transformers.
"""
