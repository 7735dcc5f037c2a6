"""The order of work: admission, queues, batches, deadlines."""
