"""The embedded pair, swarmcpp-guide and its draft: their corpus, training, export and exams. See README.md here."""
