"""fi_backend: an attention engine for LLM serving. Everything public is named here."""

__version__ = "0.1.0"
