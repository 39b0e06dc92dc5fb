"""A blob store that keeps blobs in an object store such as S3. Tests use it to check that the `BlobStore` Protocol does
not require files."""
