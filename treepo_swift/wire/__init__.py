"""What trainer and server tell each other: a note with every request, a report with every output, packed answers."""
