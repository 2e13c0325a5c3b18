"""`python -m gradwatch` is `gradwatch`."""

from gradwatch.cli import app

if __name__ == "__main__":
    app()
