#!/usr/bin/env bash
# An MLflow server with users: runs and users in PostgreSQL, artifacts in a store that the server alone reaches.
#   POSTGRES=postgresql://mlflow:PASSWORD@HOST:5432    with two databases, mlflow and mlflow_users
#   ARTIFACTS=s3://mlflow                              or a folder; a bucket's keys in AWS_*, its server in MLFLOW_S3_ENDPOINT_URL
#   MLFLOW_AUTH_ADMIN_PASSWORD=...                     of the user `admin`, made at the first start
#   MLFLOW_FLASK_SERVER_SECRET_KEY=...                 signs sessions; the same at every start
#   PERMISSION=READ                                    what users may do to others' experiments: READ, EDIT, MANAGE, NO_PERMISSIONS
# Loopback unless HOST says otherwise: what encrypts stands before it.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 1
}
: "${POSTGRES:=}" "${MLFLOW_AUTH_ADMIN_PASSWORD:=}" "${MLFLOW_FLASK_SERVER_SECRET_KEY:=}"
[[ "$POSTGRES" =~ ^postgresql://[^/]+@[^/]+$ ]] || die "POSTGRES must be postgresql://USER:PASSWORD@HOST:PORT, without a database"
[ -n "${ARTIFACTS:-}" ] || die "ARTIFACTS is not set: s3://BUCKET or a folder of the server"
[ "${#MLFLOW_AUTH_ADMIN_PASSWORD}" -ge 12 ] || die "MLFLOW_AUTH_ADMIN_PASSWORD must have 12 characters or more"
[ "${#MLFLOW_FLASK_SERVER_SECRET_KEY}" -ge 32 ] || die "MLFLOW_FLASK_SERVER_SECRET_KEY must have 32 characters or more"
case "${PERMISSION:=READ}" in
  READ | EDIT | MANAGE | NO_PERMISSIONS) ;;
  *) die "PERMISSION=$PERMISSION: must be READ, EDIT, MANAGE or NO_PERMISSIONS" ;;
esac

# Passwords reach the server in its environment and in a file of its user alone, not on its command line.
umask 077
SETTINGS="$(mktemp -d)"
trap 'rm -rf "$SETTINGS"' EXIT
printf '[mlflow]\ndefault_permission = %s\ndatabase_uri = %s\nadmin_username = admin\n' \
  "$PERMISSION" "${POSTGRES//%/%%}/mlflow_users" >"$SETTINGS/basic_auth.ini"
export MLFLOW_AUTH_CONFIG_PATH="$SETTINGS/basic_auth.ini" MLFLOW_BACKEND_STORE_URI="$POSTGRES/mlflow"
# Its background jobs are for GenAI traces: seven more processes, which a stopped server also waits for without end.
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1 MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
unset POSTGRES
"${PYTHON:-python}" -m mlflow server --app-name basic-auth --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" \
  --workers "${WORKERS:-4}" --serve-artifacts --artifacts-destination "$ARTIFACTS" &
trap 'kill -TERM $!' TERM INT
status=0
wait $! || status=$?
[ "$status" -le 128 ] || wait $! || true
exit "$status"
