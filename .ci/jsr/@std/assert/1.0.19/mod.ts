/**
 * A stand-in for `jsr:@std/assert`, for networks that do not reach jsr.io. It has only what the tests
 * use, typed as the real one is, and calls the same values equal.
 *
 * @module
 */

// deno-lint-ignore no-explicit-any
type Constructor<Type> = new (...args: any[]) => Type;

/** What a failed assertion throws. */
export class AssertionError extends Error {
  /**
   * @param message What was wrong
   * @param options The `cause`, if there is one
   */
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = "AssertionError";
  }
}

/** Fails. */
export function fail(msg?: string): never {
  throw new AssertionError(`Failed assertion${suffix(msg)}`);
}

/** Holds what is truthy. */
export function assert(expr: unknown, msg = ""): asserts expr {
  if (!expr) throw new AssertionError(msg);
}

/** Holds what is falsy. */
export function assertFalse(
  expr: unknown,
  msg = "",
): asserts expr is false | 0 | 0n | "" | null | undefined {
  if (expr) throw new AssertionError(msg);
}

/** Holds what is neither `null` nor `undefined`. */
export function assertExists<T>(actual: T, msg?: string): asserts actual is NonNullable<T> {
  if (actual === undefined || actual === null) {
    throw new AssertionError(`Expected a value, not ${actual}${suffix(msg)}`);
  }
}

/** Holds values that are equal, deeply. */
export function assertEquals<T>(actual: T, expected: T, msg?: string): void {
  if (equal(actual, expected)) return;
  throw new AssertionError(`Values are not equal${suffix(msg)}\n${difference(actual, expected)}`);
}

/** Holds values that are not equal, deeply. */
export function assertNotEquals<T>(actual: T, expected: T, msg?: string): void {
  if (!equal(actual, expected)) return;
  throw new AssertionError(`Expected a value that is not equal to ${show(actual)}${suffix(msg)}`);
}

/** Holds values that are the same by `Object.is`. */
export function assertStrictEquals<T>(
  actual: unknown,
  expected: T,
  msg?: string,
): asserts actual is T {
  if (Object.is(actual, expected)) return;
  throw new AssertionError(
    `Values are not strictly equal${suffix(msg)}\n${difference(actual, expected)}`,
  );
}

/** Holds text that a regular expression matches. */
export function assertMatch(actual: string, expected: RegExp, msg?: string): void {
  if (expected.test(actual)) return;
  throw new AssertionError(`Expected ${show(actual)} to match ${expected}${suffix(msg)}`);
}

/** Holds text that includes other text. */
export function assertStringIncludes(actual: string, expected: string, msg?: string): void {
  if (actual.includes(expected)) return;
  throw new AssertionError(`Expected ${show(actual)} to include ${show(expected)}${suffix(msg)}`);
}

/** Holds an instance of a class. */
export function assertInstanceOf<
  // deno-lint-ignore no-explicit-any
  T extends Constructor<any>,
>(actual: unknown, expectedType: T, msg = ""): asserts actual is InstanceType<T> {
  if (actual instanceof expectedType) return;
  throw new AssertionError(
    `Expected an instance of ${expectedType.name}, not ${show(actual)}${suffix(msg)}`,
  );
}

/** Holds what is greater. */
export function assertGreater<T>(actual: T, expected: T, msg?: string): void {
  if (!(actual > expected)) unordered(actual, ">", expected, msg);
}

/** Holds what is greater or equal. */
export function assertGreaterOrEqual<T>(actual: T, expected: T, msg?: string): void {
  if (!(actual >= expected)) unordered(actual, ">=", expected, msg);
}

/** Holds what is less. */
export function assertLess<T>(actual: T, expected: T, msg?: string): void {
  if (!(actual < expected)) unordered(actual, "<", expected, msg);
}

/** Holds what is less or equal. */
export function assertLessOrEqual<T>(actual: T, expected: T, msg?: string): void {
  if (!(actual <= expected)) unordered(actual, "<=", expected, msg);
}

/** Holds a function that throws; returns what it threw. */
export function assertThrows(fn: () => unknown, msg?: string): unknown;
/** Holds a function that throws an error of a class, with a message that includes a text; returns it. */
export function assertThrows<E extends Error = Error>(
  fn: () => unknown,
  ErrorClass: Constructor<E>,
  msgIncludes?: string,
  msg?: string,
): E;
export function assertThrows(fn: () => unknown, ...expected: ExpectedError): unknown {
  const { ErrorClass, msgIncludes, msg } = expectedError(expected);
  try {
    fn();
  } catch (error) {
    return checkError(error, ErrorClass, msgIncludes, msg);
  }
  throw new AssertionError(`Expected function to throw${suffix(msg)}`);
}

/** Holds a promise that is rejected; resolves to the reason. */
export function assertRejects(fn: () => PromiseLike<unknown>, msg?: string): Promise<unknown>;
/** Holds a promise rejected by an error of a class, with a message that includes a text; resolves to it. */
export function assertRejects<E extends Error = Error>(
  fn: () => PromiseLike<unknown>,
  ErrorClass: Constructor<E>,
  msgIncludes?: string,
  msg?: string,
): Promise<E>;
export async function assertRejects(
  fn: () => PromiseLike<unknown>,
  ...expected: ExpectedError
): Promise<unknown> {
  const { ErrorClass, msgIncludes, msg } = expectedError(expected);
  let promise;
  try {
    promise = fn();
  } catch (cause) {
    throw new AssertionError(`Function throws when expected to reject${suffix(msg)}`, { cause });
  }
  if (typeof promise?.then !== "function") {
    throw new AssertionError(`Function returns no promise when expected to reject${suffix(msg)}`);
  }
  try {
    await promise;
  } catch (error) {
    return checkError(error, ErrorClass, msgIncludes, msg);
  }
  throw new AssertionError(`Expected function to reject${suffix(msg)}`);
}

type ExpectedError = [
  ErrorClassOrMsg?: Constructor<Error> | string,
  msgIncludes?: string,
  msg?: string,
];

function expectedError([ErrorClass, msgIncludes, msg]: ExpectedError) {
  return typeof ErrorClass === "string"
    ? { ErrorClass: undefined, msgIncludes: undefined, msg: ErrorClass }
    : { ErrorClass, msgIncludes, msg };
}

function checkError(
  error: unknown,
  ErrorClass: Constructor<Error> | undefined,
  msgIncludes: string | undefined,
  msg: string | undefined,
): unknown {
  if (!ErrorClass) return error;
  if (!(error instanceof ErrorClass)) {
    throw new AssertionError(`Expected ${ErrorClass.name}, not ${show(error)}${suffix(msg)}`, {
      cause: error,
    });
  }
  if (msgIncludes && !error.message.includes(msgIncludes)) {
    throw new AssertionError(
      `Expected error message to include ${show(msgIncludes)}, but got ${show(error.message)}${suffix(msg)}`,
      { cause: error },
    );
  }
  return error;
}

function unordered(actual: unknown, sign: string, expected: unknown, msg?: string): never {
  throw new AssertionError(msg ?? `Expect ${show(actual)} ${sign} ${show(expected)}`);
}

function suffix(msg: string | undefined): string {
  return msg ? `: ${msg}` : ".";
}

type Properties = Record<PropertyKey, unknown>;

/** Values of these classes are equal if they read the same. */
const COMPARED_AS_TEXT = [RegExp, URL, URLSearchParams, Intl.Locale];

function equal(a: unknown, b: unknown, seen: Map<object, object> = new Map()): boolean {
  if (a === b || Object.is(a, b)) return true;
  if (typeof a !== "object" || typeof b !== "object" || !a || !b) return false;
  if (a instanceof Date && b instanceof Date) return Object.is(a.getTime(), b.getTime());
  if (kind(a) !== kind(b)) return false;
  if (ArrayBuffer.isView(a) && "length" in a) return equalItems(a, b as typeof a);
  if (a instanceof ArrayBuffer || a instanceof SharedArrayBuffer) {
    return equalItems(new Uint8Array(a), new Uint8Array(b as typeof a));
  }
  if (COMPARED_AS_TEXT.some((Class) => a instanceof Class)) return String(a) === String(b);
  if (seen.get(a) === b) return true;
  seen.set(a, b);
  if (a instanceof Set || a instanceof Map) return equalCollections(a, b as typeof a, seen);
  if (Object.keys(a).length !== Object.keys(b).length) return false;
  const keys = new Set([...deepKeys(a), ...deepKeys(b)]);
  return [...keys].every((key) => key in a && key in b && equal((a as Properties)[key], (b as Properties)[key], seen));
}

/** The prototype; an object without one counts as a plain one. */
function kind(value: object): object {
  return Object.getPrototypeOf(value) ?? Object.prototype;
}

function equalItems(a: { length?: unknown }, b: { length?: unknown }): boolean {
  const [left, right] = [a as ArrayLike<unknown>, b as ArrayLike<unknown>];
  if (left.length !== right.length) return false;
  for (let i = 0; i < left.length; i++) {
    if (left[i] !== right[i] && !Object.is(left[i], right[i])) return false;
  }
  return true;
}

/** Order does not count; keys may be objects. */
function equalCollections(
  a: Set<unknown> | Map<unknown, unknown>,
  b: Set<unknown> | Map<unknown, unknown>,
  seen: Map<object, object>,
): boolean {
  const rest = [...b.entries()];
  return a.size === b.size && [...a.entries()].every((entry) => {
    const found = rest.findIndex((other) => equal(entry[0], other[0], seen) && equal(entry[1], other[1], seen));
    if (found >= 0) rest.splice(found, 1);
    return found >= 0;
  });
}

/** The keys of an object and of its classes: what getters say counts too. */
function deepKeys(value: object): PropertyKey[] {
  const keys: PropertyKey[] = [];
  for (
    let each: object | null = value;
    each && each !== Object.prototype && each !== Array.prototype;
    each = Object.getPrototypeOf(each)
  ) keys.push(...Reflect.ownKeys(each));
  return keys;
}

function show(value: unknown): string {
  if (value instanceof Error) return `${value.name}: ${JSON.stringify(value.message)}`;
  return Deno.inspect(value, {
    compact: true,
    depth: 10,
    iterableLimit: 1000,
    strAbbreviateSize: 10_000,
  });
}

/** How many equal lines stand around each change. */
const CONTEXT_LINES = 3;

/** The lines of both values: `-` before those only in the actual, `+` before those only in the expected. */
function difference(actual: unknown, expected: unknown): string {
  const changes = diff(lines(actual), lines(expected));
  if (changes.every((line) => line.startsWith(" "))) {
    return ["", "    Both read as", "", ...changes.map((line) => `    ${line}`), ""].join("\n");
  }
  const isNear = (at: number) =>
    changes.slice(Math.max(0, at - CONTEXT_LINES), at + CONTEXT_LINES + 1)
      .some((line) => !line.startsWith(" "));
  const shown = changes.map((line, at) => isNear(at) ? `    ${line}` : "    …")
    .filter((line, at, all) => line !== "    …" || line !== all[at - 1]);
  return ["", "    [Diff] - Actual / + Expected", "", ...shown, ""].join("\n");
}

/** A value over many lines: text by its own, bytes by sixteen, other values by their members. */
function lines(value: unknown): string[] {
  if (typeof value === "string") {
    return value.split(/(?<=\n)/).map((line) => JSON.stringify(line));
  }
  if (value instanceof Uint8Array) {
    const rows = Array.from({ length: Math.ceil(value.length / 16) }, (_, row) => {
      const bytes = value.subarray(row * 16, row * 16 + 16);
      const text = String.fromCharCode(...bytes).replace(/[^ -~]/g, ".");
      const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
      return `${hex.padEnd(47)}  ${text}`;
    });
    return [`Uint8Array(${value.length})`, ...rows];
  }
  return Deno.inspect(value, {
    compact: false,
    depth: 20,
    getters: true,
    iterableLimit: 10_000,
    sorted: true,
    strAbbreviateSize: 100_000,
    trailingComma: true,
  }).split("\n");
}

/** Above this many pairs of lines, changed parts are shown whole instead of matched line by line. */
const MAX_PAIRS = 4_000_000;

/** Both lists as one, by their longest common subsequence. */
function diff(a: readonly string[], b: readonly string[]): string[] {
  let start = 0;
  while (start < a.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < Math.min(a.length, b.length) - start && a.at(-1 - end) === b.at(-1 - end)) end++;
  const left = a.slice(start, a.length - end), right = b.slice(start, b.length - end);
  return [
    ...a.slice(0, start).map((line) => `  ${line}`),
    ...(left.length * right.length > MAX_PAIRS
      ? [...left.map((line) => `- ${line}`), ...right.map((line) => `+ ${line}`)]
      : diffMiddle(left, right)),
    ...a.slice(a.length - end).map((line) => `  ${line}`),
  ];
}

function diffMiddle(a: readonly string[], b: readonly string[]): string[] {
  const width = b.length + 1;
  const common = new Uint32Array((a.length + 1) * width);
  const at = (i: number, j: number) => common[i * width + j] ?? 0;
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i * width + j] = a[i] === b[j] ? at(i + 1, j + 1) + 1 : Math.max(at(i + 1, j), at(i, j + 1));
    }
  }
  const out: string[] = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) out.push(`  ${a[i++]}`) && j++;
    else if (j >= b.length || (i < a.length && at(i + 1, j) >= at(i, j + 1))) {
      out.push(`- ${a[i++]}`);
    } else out.push(`+ ${b[j++]}`);
  }
  return out;
}
