"""The tables and pictures of the pages, made from results: table.py and plots.py are the commands."""
