"""DiffRate at a small scale: accuracy at equal cost, random schedules, ablations, transfer."""
