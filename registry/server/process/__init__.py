"""Server processes: the supervisor, its workers, the application's lifespan."""
