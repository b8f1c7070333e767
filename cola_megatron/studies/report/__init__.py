"""From the table of a study to fits, sentences, figures and a page."""
