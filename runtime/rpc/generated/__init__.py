"""Python code of the protocol in ``protos/``, written by ``make proto``: never edited by hand."""
