"""What an optimization shows: its result, tables, pictures and pages."""
