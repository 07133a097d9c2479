"""From requests to tokens: schedule, prefill, decode, collect, and the state and graphs that these need."""
