"""What people and their tools ask beside the distribution API: FastAPI routers with pydantic models."""
