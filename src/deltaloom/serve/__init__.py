"""One base with many tasks behind OpenAI's interface, requests of all tasks in one batch."""
