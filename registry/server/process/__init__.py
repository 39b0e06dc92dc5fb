"""The server's processes: the supervisor, its workers, and the application's lifespan in each worker."""
