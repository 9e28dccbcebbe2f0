"""Methods that search for settings: they try some, keep a record of every trial, and choose."""
