"""Makes the bucket of ARTIFACTS in the store at MLFLOW_S3_ENDPOINT_URL unless it is there."""

from __future__ import annotations

import os
import sys
from urllib.parse import urlsplit

import boto3
from botocore.exceptions import ClientError

THERE = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")


def main() -> int:
    """Returns 0 when the bucket is there."""
    address, bucket = os.environ["MLFLOW_S3_ENDPOINT_URL"], urlsplit(os.environ["ARTIFACTS"]).netloc
    try:
        boto3.client("s3", endpoint_url=address).create_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in THERE:
            print(f"error: bucket {bucket} at {address}: {error}", file=sys.stderr)
            return 1
    print(f"bucket {bucket} is there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
