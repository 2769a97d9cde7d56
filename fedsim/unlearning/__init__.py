"""Forgetting classes and clients: scores, masks, edits, and how forgetting is measured (torch only)."""
