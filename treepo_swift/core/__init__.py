"""The algorithm: a pure state machine. Segments go in, engine requests come out; no I/O, no clock."""
