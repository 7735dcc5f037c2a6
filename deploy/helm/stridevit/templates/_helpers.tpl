{{- define "stridevit.name" -}}
{{- $name := .Release.Name -}}
{{- if not (contains "stridevit" $name) }}{{ $name = printf "%s-stridevit" $name }}{{ end -}}
{{- $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "stridevit.selector" -}}
app.kubernetes.io/name: stridevit
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "stridevit.labels" -}}
{{ include "stridevit.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "stridevit.metadata" -}}
name: {{ include "stridevit.name" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "stridevit.labels" . | nindent 2 }}
{{- end -}}

{{/* The delay, what was accepted, 10 s for threads to end, and 5 s to spare. */}}
{{- define "stridevit.terminationSeconds" -}}
{{ add .Values.shutdown.delaySeconds .Values.shutdown.gracefulSeconds 15 }}
{{- end -}}

{{/* Settings as TOML: JSON's scalars and lists are TOML too. */}}
{{- define "stridevit.settings" -}}
{{- range $name, $value := .Values.settings }}
{{ $name }} = {{ $value | toJson }}
{{- end }}
{{- end -}}
