"""`python -m foodextract`."""

from foodextract.cli import app

if __name__ == "__main__":
    app()
