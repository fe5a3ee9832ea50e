"""How the families of models write tool calls and reasoning, and how to read it out of a stream of text."""
