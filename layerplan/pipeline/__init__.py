"""The stages of a run in order, the run folder they write to, and what each command of the front door does."""
