// Gives a request the backend that it asks for, if that is healthy.

export function choose(request, targets) {
  const [wanted] = request.header("x-backend").map((value) => new TextDecoder().decode(value));
  const at = targets.findIndex(({ service, healthy }) => service === wanted && healthy > 0);
  return at < 0 ? null : at;
}
