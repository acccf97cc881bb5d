"""Scripts to read from top to bottom and to run: from data to an adapter's file, serving, export."""
