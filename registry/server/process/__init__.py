"""The processes of the server: the supervisor, its workers, and the lifespan of the application in each worker."""
