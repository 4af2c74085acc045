"""Agentic Text-to-SQL: many LLM calls per question, over any SQLite file and any endpoint."""
