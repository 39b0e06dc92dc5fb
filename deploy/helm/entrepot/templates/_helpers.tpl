{{- define "entrepot.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* The name of most objects. A StatefulSet's pods and their labels add up to 11 characters to it. */}}
{{- define "entrepot.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $full .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "entrepot.selectorLabels" -}}
app.kubernetes.io/name: {{ include "entrepot.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "entrepot.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "entrepot.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: registry
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Labels of the pod: without versions, so that a new chart does not replace the pod. */}}
{{- define "entrepot.podLabels" -}}
{{ include "entrepot.selectorLabels" . }}
app.kubernetes.io/component: registry
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- with .Values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "entrepot.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "entrepot.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "entrepot.secretName" -}}
{{- default (include "entrepot.fullname" .) .Values.existingSecret }}
{{- end }}

{{/* Not empty if the pod mounts a Secret. */}}
{{- define "entrepot.hasSecret" -}}
{{- if or .Values.existingSecret .Values.admin.enabled }}true{{ end }}
{{- end }}

{{- define "entrepot.claimName" -}}
{{- default (include "entrepot.fullname" .) .Values.persistence.existingClaim }}
{{- end }}

{{- define "entrepot.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{/* Not empty if the metrics have a port of their own. */}}
{{- define "entrepot.hasMetrics" -}}
{{- if or .Values.metrics.enabled .Values.serviceMonitor.enabled }}true{{ end }}
{{- end }}

{{/* The name of the registry's port, and the scheme of the probes. */}}
{{- define "entrepot.scheme" -}}
{{- ternary "https" "http" (ne .Values.tls.secretName "") }}
{{- end }}

{{/* The address of the registry as clients see it, where an Ingress or a route says it and the settings do not. */}}
{{- define "entrepot.publicUrl" -}}
{{- if not .Values.config.public_url }}
{{- if .Values.ingress.enabled }}
{{- with .Values.ingress.hosts }}{{ printf "%s://%s" (ternary "https" "http" (gt (len $.Values.ingress.tls) 0)) (first .).host }}{{ end }}
{{- else if .Values.httproute.enabled }}
{{- with .Values.httproute.hostnames }}{{ printf "https://%s" (first .) }}{{ end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Refuses values that cannot work, and says what to do. */}}
{{- define "entrepot.validate" -}}
{{- if gt (int .Values.replicaCount) 1 }}
{{- fail (printf "replicaCount is %d, but this version stores its content in a SQLite database and files on one volume, which one pod at a time may use. Set replicaCount to 1; for more throughput give the pod more cores (resources, config.workers)." (int .Values.replicaCount)) }}
{{- end }}
{{- range $name, $instead := dict "data" "the volume is mounted at /var/lib/entrepot" "listen" "use listenAddress and service.port" "tls" "use tls.secretName" }}
{{- if hasKey $.Values.config $name }}
{{- fail (printf "config.%s is set by the chart: %s." $name $instead) }}
{{- end }}
{{- end }}
{{- if hasKey (default dict .Values.config.metrics) "listen" }}
{{- fail "config.metrics.listen is set by the chart: use metrics.enabled and metrics.port." }}
{{- end }}
{{- if and .Values.config.insecure_open .Values.admin.enabled }}
{{- fail "config.insecure_open is for a registry without accounts, but admin.enabled adds one. Set admin.enabled to false, or remove config.insecure_open." }}
{{- end }}
{{- if and .Values.httproute.enabled (not .Values.httproute.parentRefs) }}
{{- fail "httproute.enabled needs httproute.parentRefs: the gateways that take the route." }}
{{- end }}
{{- end }}
