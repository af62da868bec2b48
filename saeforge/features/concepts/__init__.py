"""Which latent is which concept: every latent against every label of labelled texts, beside controls."""

from saeforge.features.concepts.measure import TopLatent
from saeforge.features.concepts.table import CLAIMS, CONVENTIONS, Concept, ConceptTable, Failure, concept_table

__all__ = ["CLAIMS", "CONVENTIONS", "Concept", "ConceptTable", "Failure", "TopLatent", "concept_table"]
