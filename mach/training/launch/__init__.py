"""Who trains which repetitions where: the schedule, its driver and the workers."""
