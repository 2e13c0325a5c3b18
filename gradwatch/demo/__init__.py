"""A real training run, broken on purpose: what gradwatch sees of it, live and at the end.

    task (model, data) + fault -> training loop with one attach -> view -> recording -> summary

Nothing here is imported by the library; torch is imported when a run begins.
"""
