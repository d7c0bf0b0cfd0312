"""What the compiler makes of many models and schedules, as text that two versions of the code can be compared by."""
