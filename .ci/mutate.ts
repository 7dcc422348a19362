/**
 * Finds out what the tests do not notice: makes one small change to server.ts at a time, in a copy of the project,
 * and runs the tests there. A change that no test notices "survives": a test is missing, or the code is not needed,
 * or the change makes no difference to anybody, and then belongs into `EQUIVALENT`.
 *
 * ```sh
 * deno task mutate --seed 7 --count 150
 * deno task mutate --only Request       # one section of server.ts
 * deno task mutate --change 'status ⟦< → <=⟧ 200' # what survived once again: the changes whose line has this
 * deno task mutate --list               # what would be changed, and nothing else
 * ```
 *
 * Which changes are made depends on the seed and on server.ts alone. Needs Deno 2.9 or later.
 *
 * @module
 */

import * as nodeModule from "node:module";

/**
 * Changes that make no difference, as they are printed, and why. They are not made. A line without brackets stands for
 * all changes of it.
 */
const EQUIVALENT: readonly (readonly [change: string, reason: string])[] = [
  // How much is done at once, and what is kept so as not to be made again: nobody gets anything else by it.
  ["const SLAB_SIZE = 32 * 1024;", "how buffers are cut shows nowhere"],
  ["const BUFFER_SIZE = 4 * 1024;", "it grows when more is needed"],
  ["const READY_LIMIT = 64 * 1024;", "how answers are gathered shows nowhere"],
  ["const REPEATABLE_LIMIT = 4 * 1024;", "what is not kept is made again"],
  ["const CHUNKED_AT_ONCE = 16 * 1024;", "how many chunks share a write shows nowhere"],
  ["const PIECE_SIZE = 256 * 1024, CONVERTED_PIECE = 64 * 1024;", "how files are cut to be read shows nowhere"],
  ["const COMPRESSION_PIECE = 64 * 1024;", "how content is cut to be compressed shows nowhere"],
  ["const HINTS_SIZE = 1024 * 1024;", "what is not kept is found again"],
  ["const PLACE_SIZE = 4096;", "an estimate"],
  ["const LISTING_SLICE = 500;", "others get their turn sooner or later"],
  ["const WORK_TIME = 8;", "others get their turn sooner or later"],
  ["const LOG_INTERVAL = 50;", "lines are written sooner or later"],
  ["const LETTERS = ⟦1024 → 8192⟧;", "more room than is needed"],
  ["writer.reserve(⟦3 → 4⟧, 0);", "room for one byte more than is written"],
  ["const runs = runsOf(bytes), sample = new Uint8Array(SAMPLE + RUN + ⟦2 → 3⟧ * BESIDE);", "more room than is needed"],
  ["⟦DECODERS.set(encoding, decoder); → ⟧", "what is not kept is made again"],
  ["⟦LANGUAGES.set(code, language); → ⟧", "what is not kept is learnt again"],
  [
    "const step = Math.max(1, Math.⟦trunc → ceil⟧(CHUNKED_AT_ONCE / size)) * size;",
    "how many chunks share a write shows nowhere",
  ],
  ["if (at ⟦>= → >⟧ end) break;", "one piece more is converted, and none of it is sent"],
  [
    "⟦if (common + least > limit * BIT) return Infinity; → ⟧",
    "what costs more than the limit is dropped by the caller, too",
  ],
  [
    "if (common + least ⟦> → >=⟧ limit * BIT) return Infinity;",
    "what costs as much as the limit is dropped by the caller",
  ],
  // What is never used, or comes to the same.
  ["for (let unit = ⟦0 → 1⟧; unit < 0x80; unit++) repertoire.units[unit] = unit;", "the first one is 0 from the start"],
  ["for (let i = 0; i < ⟦39420 → 39421⟧; i++) pointers[text.charCodeAt(i)] = i + 1;", "there is no such character"],
  ["for (let i = 0; i ⟦< → <=⟧ 39420; i++) pointers[text.charCodeAt(i)] = i + 1;", "there is no such character"],
  ["const codePoint = text.codePointAt(at)!, wide = codePoint ⟦> → >=⟧ 0xffff;", "no pair of bytes is U+FFFF"],
  ["const { units } = pairs(encoding, leads, numbers(⟦0x40 → 0x3f⟧, 0xfc));", "no pair has such a byte"],
  ["const { units } = pairs(encoding, leads, numbers(0x40, ⟦0xfc → 0xfd⟧));", "no pair has such a byte"],
  [
    "codes.push(...numbers(first, last).flatMap((row) => numbers(0x40, ⟦0x7e → 0x7f⟧).flatMap((column) => [row, column])));",
    "no pair has such a byte",
  ],
  [
    "codes.push(...numbers(first, last).flatMap((row) => numbers(⟦0x40 → 0x3f⟧, 0x7e).flatMap((column) => [row, column])));",
    "no pair has such a byte",
  ],
  ["for (const cost of costs) if (cost ⟦< → <=⟧ least) least = cost;", "it is as little"],
  [
    "for (let i = 0; i ⟦< → <=⟧ costs.length; i++) costs[i] = Math.min(costs[i]!, least + SWITCH * BIT);",
    "nothing is written behind the end of an array",
  ],
  [
    "if (letterBefore ⟦> → >=⟧ 0) addLetter(costs, languages, letterBefore, 0);",
    "an edge behind an edge costs nothing",
  ],
  ["if (isLetter(kind)) addLetter(costs, languages, letterBefore, letter || -⟦1 → 2⟧);", "any number below 0 will do"],
  [
    "const unit = i < text.length ? text.charCodeAt(i) : ⟦0x0a → 0x9⟧, letter = numbers[unit]!;",
    "another white space that costs as much",
  ],
  ["const other = { encoding, region: -⟦1 → 0⟧, rarity: 5, languages: everyLanguage };", "its region is not asked for"],
  ["const other = { encoding, region: -⟦1 → 2⟧, rarity: 5, languages: everyLanguage };", "its region is not asked for"],
  [
    "for (let i = 0; i ⟦< → <=⟧ head.length; i++) if (head[i] === 0) zeros[i & 1 ? 1 : 0]++;",
    "behind the end there is no 0",
  ],
  ['const kind = (goesOn ? 1 : 0) + minor * 2 + (method === "HEAD" ? ⟦4 → 5⟧ : 0);', "the kinds differ as much"],
  [
    "const carry: Carry = { state: ASCII, isLast: ⟦false → true⟧ };",
    "it is set for each piece",
  ],
  [
    "let workedSince = ⟦0 → 1⟧, workLine: Promise<unknown> = Promise.resolve(), waitingSteps = 0;",
    "a millisecond of the start",
  ],
  ['const tag = state.map((number) => (number ?? 0).toString(⟦36 → 35⟧)).join("-");', "another spelling of a tag"],
  ["#readySize = ⟦0 → 1⟧;", "a byte sooner, how answers are gathered shows nowhere"],
  [
    "this.#sweepAfter(this.#interval = Math.max(10, Math.min(1000, Math.min(head, idle) / 4)));",
    "a wait ends a little sooner or later",
  ],
  ["if (now ⟦> → >=⟧ this.#drainDeadline) return this.#cutOff();", "a fraction of a millisecond"],
  ["if (now ⟦> → >=⟧ connection.deadline) connection.expire();", "a fraction of a millisecond"],
  [
    "else if (now ⟦> → >=⟧ this.#idleDeadline && connection.isIdle) connection[Symbol.dispose]();",
    "a fraction of a millisecond",
  ],
  ["#lifetime = ⟦0 → 1⟧;", "the first look is taken anyway"],
  ['#waiting: Waiting = ⟦"request" → ""⟧;', "it waits for something before anybody looks"],
  ["#received = ⟦0 → 1⟧;", "a millisecond more to send content in"],
  ["this.#reserved = ⟦0 → 1⟧;", "nobody looks any more"],
  ["let contentInMemory = ⟦0 → 1⟧;", "a byte less for all content"],
  [
    "for (let turn = 0, seen = -⟦1 → 2⟧; turn < BACKLOG_TURNS && seen !== this.#accepted; turn++) {",
    "any number below 0 will do",
  ],
  [
    "while (valueEnd ⟦> → >=⟧ valueStart && (CLASSES[bytes[valueEnd - 1]!]! & IN_SPACE) !== 0) valueEnd--;",
    "what ends before it begins is empty, too",
  ],
  [
    "for (let count; length ⟦< → <=⟧ buffer.length && (count = readSome(buffer.subarray(length))) > 0;) length += count;",
    "nothing is read into an empty rest",
  ],
  ["const wide = (⟦0xff → 0x100⟧ - code) >>> 31;", "no pair is 0x100"],
  [
    'const conversion = isAsStored(variant) ? "" : `-${stored}.${encoding}${hasMark ? "+" : "."}${settings.unmappable[⟦0 → 1⟧]}`;',
    "the second letters of the modes differ as well",
  ],
  // Every file has its times, where tests run.
  ["const times = [mtime?.getTime() ?? ⟦0 → 1⟧, ctime?.getTime() ?? 0];", "there is a time"],
  ["const times = [mtime?.getTime() ?? 0, ctime?.getTime() ?? ⟦0 → 1⟧];", "there is a time"],
  ["return Math.max(⟦0 → 1⟧, ...times.filter((time) => time <= now));", "a millisecond of 1970"],
  ["const second = (time: Date | null) => Math.trunc((time?.getTime() ?? ⟦0 → 1⟧) / 1000);", "there is a time"],
  ['const tag = state.map((number) => (number ?? ⟦0 → 1⟧).toString(36)).join("-");', "there is a number"],
  ["const time = Math.min(info.mtime?.getTime() ?? ⟦0 → 1⟧, now);", "there is a time"],
  // Any other length of a digest does as well.
  [
    'return new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)).subarray(0, ⟦12 → 13⟧).toHex();',
    "a longer tag",
  ],
  [
    'return new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)).subarray(0, ⟦12 → 11⟧).toHex();',
    "a shorter tag",
  ],
];

/** Functions that only run where `@std/cli` is to be had: without it, nothing can notice a change of them. */
const WITH_PACKAGE = ["splitByPackage", "attachValues"];

// ── What can be changed ─────────────────────────────────────────────────────────────────────────
// A token is changed into another one that could stand there. Comments, types, regular expressions and most texts are
// left alone: a text that nobody compares is not worth a test.

type Kind = "name" | "number" | "string" | "template" | "operator";

interface Token {
  readonly kind: Kind;
  readonly text: string;
  /** Where it begins. */
  readonly at: number;
  /** It stands in a template, between `${` and `}`. */
  readonly inText: boolean;
}

const SPACE = /\s+|\/\/.*|\/\*[^]*?\*\//y;
const NAME = /#?[\p{ID_Start}$_][\p{ID_Continue}$]*/uy;
const NUMBER = /0x[\da-f_]+|(?:\d[\d_]*)(?:\.\d+)?(?:e[+-]?\d+)?/iy;
const STRING = /"(?:[^"\\\n]|\\[^])*"|'(?:[^'\\\n]|\\[^])*'/y;
const REGEXP = /\/(?:[^/\\[\n]|\\.|\[(?:[^\]\\\n]|\\.)*\])+\/[a-z]*/y;
const OPERATOR =
  /\.{3}|>>>=|\*\*=|\?\?=|&&=|\|\|=|<<=|>>=|[=!]==?|>>>?|<<|&&|\|\||\?\?|\?\.(?!\d)|=>|\*\*|\+\+|--|[-+*/%&|^<>]=?|[^]/y;
/** After these an expression begins, and with `/` a regular expression. */
const BEGINNERS = new Set(["return", "typeof", "case", "in", "of", "yield", "await", "throw", "else", "do", "void"]);

/** The tokens of a program without types. */
function tokenize(code: string): Token[] {
  const tokens: Token[] = [];
  let at = 0, depth = 0;
  const match = (pattern: RegExp): string | undefined => {
    pattern.lastIndex = at;
    return pattern.exec(code)?.[0];
  };
  const push = (kind: Kind, text: string) => {
    tokens.push({ kind, text, at, inText: depth > 0 });
    at += text.length;
  };
  const isExpressionNext = () => {
    const last = tokens.at(-1);
    if (last === undefined || last.kind === "operator") return !/^[)\]}]$/.test(last?.text ?? "");
    return last.kind === "name" && BEGINNERS.has(last.text);
  };
  /** What stands in a template between `${` and `}` is code like any other. */
  const readTemplate = () => {
    for (at++; at < code.length && code[at] !== "`";) {
      if (code[at] === "\\") at += 2;
      else if (code.startsWith("${", at)) at += 2, depth++, readUntilBrace(), depth--, at++;
      else at++;
    }
    at++;
    tokens.push({ kind: "template", text: "", at, inText: depth > 0 });
  };
  const readUntilBrace = () => {
    for (let braces = 0; at < code.length;) {
      const space = match(SPACE);
      if (space !== undefined) {
        at += space.length;
        continue;
      }
      if (code[at] === "}" && braces === 0) return;
      if (code[at] === "{") braces++;
      if (code[at] === "}") braces--;
      readToken();
    }
  };
  const readToken = () => {
    if (code[at] === "`") return readTemplate();
    const name = match(NAME), number = match(NUMBER), text = match(STRING);
    if (name !== undefined) push("name", name);
    else if (number !== undefined) push("number", number);
    else if (text !== undefined) push("string", text);
    else if (code[at] === "/" && isExpressionNext()) push("template", match(REGEXP) ?? "/");
    else push("operator", match(OPERATOR)!);
  };
  while (at < code.length) readUntilBrace(), at < code.length && at++;
  return tokens;
}

/** The same text with blanks instead of types: what is left stands where it stood. */
function withoutTypes(source: string): string {
  const { stripTypeScriptTypes } = nodeModule as { stripTypeScriptTypes?: (code: string) => string };
  if (stripTypeScriptTypes === undefined) {
    console.error("deno task mutate needs Deno 2.9 or later: it must know what is a type");
    Deno.exit(2);
  }
  // A parameter that is a property, too, is more than a type.
  const plain = source.replace(
    /^ *constructor\([^)]*\)/gm,
    (head) => head.replace(/\b(?:readonly|public|private) /g, (word) => " ".repeat(word.length)),
  );
  return stripTypeScriptTypes(plain);
}

/** What an operator or a name could be instead. */
const INSTEAD: Readonly<Record<string, string>> = {
  "<": "<=",
  "<=": "<",
  ">": ">=",
  ">=": ">",
  "===": "!==",
  "!==": "===",
  "&&": "||",
  "||": "&&",
  "??": "&&",
  "+": "-",
  "-": "+",
  "*": "/",
  "/": "*",
  "%": "*",
  "<<": ">>",
  ">>": "<<",
  ">>>": ">>",
  "&": "|",
  "|": "&",
  "^": "&",
  "++": "--",
  "--": "++",
  "+=": "-=",
  "-=": "+=",
  "*=": "/=",
  "|=": "&=",
  true: "false",
  false: "true",
  min: "max",
  max: "min",
  some: "every",
  every: "some",
  break: "continue",
  floor: "ceil",
  ceil: "floor",
  trunc: "ceil",
};

/** One change: what stands at `at` is replaced. */
interface Change {
  readonly at: number;
  readonly before: string;
  readonly after: string;
}

/** All changes of single tokens, and of whole lines: a call that is left out, an early end that does not come. */
function changesOf(source: string): Change[] {
  const tokens = tokenize(withoutTypes(source)), changes: Change[] = [];
  tokens.forEach((token, i) => {
    for (const after of insteadOf(source, tokens, i, token)) {
      changes.push({ at: token.at, before: token.text, after });
    }
  });
  for (
    const { 0: line, index } of source.matchAll(
      /^ +(?:if \(.*\) (?:return|throw|continue|break)\b.*|[\w.#?]+\(.*\));$/gm,
    )
  ) {
    const before = line.trimStart();
    if (!before.startsWith("super(")) changes.push({ at: index + line.length - before.length, before, after: "" });
  }
  return changes;
}

function insteadOf(source: string, tokens: readonly Token[], i: number, { kind, text, at, inText }: Token): string[] {
  const last = tokens[i - 1], next = tokens[i + 1];
  // How much of something an error quotes is nobody's to compare.
  const lineStart = source.lastIndexOf("\n", at) + 1;
  if (inText && source.slice(lineStart, at).includes("Error(")) return [];
  if (kind === "number") {
    return insteadOfNumber(text, source.slice(lineStart, at), /Array$/.test(tokens[i - 2]?.text ?? ""));
  }
  // A text that something is unless it is told otherwise.
  if (kind === "string") return text.length > 2 && /^(?:=|\?\?)$/.test(last?.text ?? "") ? ['""'] : [];
  if (text === "!") return [""];
  // The name of a member, but no key of an object; and no sign before a number.
  const isMember = last?.text === "." && next?.text === "(";
  if (kind === "name" && !isMember && !/^(?:true|false|break)$/.test(text)) return [];
  const hasOperand = last !== undefined && (last.kind !== "operator" || /^[)\]}]$/.test(last.text)) &&
    !BEGINNERS.has(last.text);
  if ((text === "-" || text === "+") && !hasOperand) return [];
  if (text === "*" && (last?.text === "async" || last?.text === "function" || last?.text === "yield")) return [];
  // `+` between texts is hardly ever `-`: anything at all would notice that.
  if (text === "+" && (last?.kind !== "name" && last?.kind !== "number" || next?.kind === "template")) return [];
  const instead = Object.hasOwn(INSTEAD, text) ? INSTEAD[text] : undefined;
  return instead === undefined ? [] : [instead];
}

/** Figures that somebody chose, and weights in a table: they must be off by more than one to be wrong. */
const CHOSEN = /^const [A-Z\d_]+ = [\d_* ]*$|, [A-Z\d_]+ = [\d_* ]*$|^ +\["/;

/** A bound that is off by one. `before` is what stands before it in its line. */
function insteadOfNumber(text: string, before: string, isLength: boolean): string[] {
  const number = Number(text.replaceAll("_", "")),
    write = (value: number) => /^0x/i.test(text) ? `0x${value.toString(16)}` : `${value}`;
  if (!Number.isSafeInteger(number)) return [];
  if (CHOSEN.test(before)) {
    return [...(number > 8 ? [write(number >> 3)] : []), write(number * 8 + (number === 0 ? 8 : 0))];
  }
  if (number === 0) return [write(1)];
  // An array that is longer than it needs to be does no harm.
  return isLength ? [write(number - 1)] : [write(number - 1), write(number + 1)];
}

/** A change in its line, as it is printed: what becomes what stands between brackets. */
function nameOf(source: string, { at, before, after }: Change): string {
  const begin = source.lastIndexOf("\n", at - 1) + 1, end = source.indexOf("\n", at);
  return `${source.slice(begin, at)}⟦${before} → ${after}⟧${source.slice(at + before.length, end)}`.trim();
}

/** The line of a change, as it is without it. */
function textOf(source: string, { at }: Change): string {
  return source.slice(source.lastIndexOf("\n", at - 1) + 1, source.indexOf("\n", at)).trim();
}

/** Name of the function at the top level that something stands in; empty if it stands in none. */
function functionAt(source: string, at: number): string {
  const begin = source.slice(0, at).match(/^(?:async )?function \w+|^}/gm)?.at(-1);
  return /\w+$/.exec(begin ?? "")?.[0] ?? "";
}

const lineOf = (source: string, at: number) => source.slice(0, at).split("\n").length;

/** The sections of a file, by their banners: the name of each, and its first line. */
function sectionsOf(text: string): { readonly name: string; readonly line: number }[] {
  return text.split("\n").flatMap((line, i) => {
    const name = /^\/\/ ── (.*?) ─+$/.exec(line)?.[1];
    return name === undefined ? [] : [{ name, line: i + 1 }];
  });
}

const sectionAt = (sections: ReturnType<typeof sectionsOf>, line: number) =>
  sections.findLast((section) => section.line <= line)?.name ?? "";

/** Puts a list into an order that the seed determines (splitmix32). */
function shuffle<T>(list: readonly T[], seed: number): T[] {
  let state = Math.imul(seed, 0x9e3779b1);
  const below = (limit: number) => {
    let z = state = state + 0x9e3779b9 | 0;
    z = Math.imul(z ^ z >>> 16, 0x21f0aaad);
    z = Math.imul(z ^ z >>> 15, 0x735a2d97);
    return Math.floor(((z ^ z >>> 15) >>> 0) / 2 ** 32 * limit);
  };
  const shuffled = [...list];
  for (let i = shuffled.length - 1; i > 0; i--) {
    const j = below(i + 1);
    [shuffled[i], shuffled[j]] = [shuffled[j]!, shuffled[i]!];
  }
  return shuffled;
}

// ── Running the tests ───────────────────────────────────────────────────────────────────────────
// Each lane has a copy of the project. All that is ever written, also by the tests and by Deno itself, lies in one
// folder, which goes at the end, however that comes.

const project = new URL("../", import.meta.url);
const PERMISSIONS = ["--allow-net", "--allow-read", "--allow-write", "--allow-run", "--allow-env"];

/** Takes the place of `Deno.test` in a copy, to run first what is likely to notice. */
const ORDER = `
type Registration = Parameters<typeof Deno.test>;
const original = Deno.test, registered: Registration[] = [];
const nameOf = ([first]: Registration) => typeof first === "string" ? first : (first as { name: string }).name;
Object.assign(Deno, { test: Object.assign((...test: Registration) => void registered.push(test), original) });
export function register(): void {
  const order = JSON.parse(Deno.readTextFileSync(new URL("./order.json", import.meta.url))) as string[];
  const places = new Map(order.map((name, i) => [name, i]));
  const wanted = registered.filter((test) => places.has(nameOf(test)));
  wanted.sort((a, b) => places.get(nameOf(a))! - places.get(nameOf(b))!);
  for (const test of wanted) original(...test);
}
`;

/** A test, as it went without any change. */
interface Test {
  readonly name: string;
  readonly section: string;
  /** In seconds. */
  readonly time: number;
  readonly isSound: boolean;
}

interface Outcome {
  readonly success: boolean;
  readonly isLate: boolean;
  readonly report: string;
  readonly output: string;
}

/** A folder with copies of the project. */
class Workshop implements Disposable {
  readonly base = Deno.makeTempDirSync({ prefix: "mutate-" });
  readonly #running = new Set<number>();
  readonly #environment: Record<string, string>;

  constructor(standIns: boolean) {
    const folder = (name: string) => {
      Deno.mkdirSync(`${this.base}/${name}`);
      return `${this.base}/${name}`;
    };
    this.#environment = {
      DENO_DIR: folder("cache"),
      TMPDIR: folder("t"),
      NO_COLOR: "1",
      DENO_NO_UPDATE_CHECK: "1",
      ...(standIns && { JSR_URL: new URL(".ci/jsr", project).href }),
    };
  }

  /** A copy of the project, whose tests run in an order that is given each time. */
  makeCopy(name: string): string {
    const copy = `${this.base}/${name}`;
    copyFolder(project, new URL(`file://${copy}/`));
    Deno.writeTextFileSync(`${copy}/order.ts`, ORDER);
    const tests = Deno.readTextFileSync(`${copy}/server_test.ts`);
    Deno.writeTextFileSync(
      `${copy}/ordered_test.ts`,
      `import { register } from "./order.ts";\n${tests}\nregister();\n`,
    );
    return copy;
  }

  /** Runs the tests of a file of a copy, until none of them ends for so many seconds. */
  async run(copy: string, file: string, seconds: number, ...options: string[]): Promise<Outcome> {
    const report = `${copy}/report.xml`;
    await Deno.remove(report).catch(() => {});
    const args = ["test", "--quiet", "--no-check", `--junit-path=${report}`, ...options, ...PERMISSIONS, file];
    // A group of its own: what the tests have started ends with them.
    const child = new Deno.Command(Deno.execPath(), {
      args: args,
      cwd: copy,
      env: this.#environment,
      detached: true,
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    this.#running.add(child.pid);
    let isLate = false, timer: ReturnType<typeof setTimeout> | undefined;
    const watch = () => {
      clearTimeout(timer);
      timer = setTimeout(() => (isLate = true, killGroup(child.pid)), seconds * 1000);
    };
    watch();
    const output = Promise.all([readText(child.stdout, watch), readText(child.stderr)]);
    const { success } = await child.status;
    clearTimeout(timer);
    killGroup(child.pid);
    this.#running.delete(child.pid);
    const text = (await output).join("");
    return { success, isLate, report: await Deno.readTextFile(report).catch(() => ""), output: text };
  }

  [Symbol.dispose](): void {
    for (const pid of this.#running) killGroup(pid);
    for (let attempt = 0; attempt < 20; attempt++) {
      try {
        return Deno.removeSync(this.base, { recursive: true });
      } catch { /* What was just killed may still have written a file. */ }
    }
  }
}

/** All of a stream; tells of each piece that comes. */
async function readText(stream: ReadableStream<Uint8Array>, onPiece = () => {}): Promise<string> {
  let text = "";
  for await (const piece of stream.pipeThrough(new TextDecoderStream())) {
    text += piece;
    onPiece();
  }
  return text;
}

/** Ends a process and all that it started. */
function killGroup(pid: number): void {
  try {
    Deno.kill(Deno.build.os === "windows" ? pid : -pid, "SIGKILL");
  } catch { /* It has ended. */ }
}

function copyFolder(from: URL, to: URL): void {
  Deno.mkdirSync(to, { recursive: true });
  for (const { name, isDirectory } of Deno.readDirSync(from)) {
    if (name === ".git" || name === "node_modules" || name === "coverage") continue;
    const [source, target] = [from, to].map((base) =>
      new URL(encodeURIComponent(name) + (isDirectory ? "/" : ""), base)
    );
    if (isDirectory) copyFolder(source!, target!);
    else Deno.copyFileSync(source!, target!);
  }
}

const ENTITIES: Readonly<Record<string, string>> = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'" };

/** Each test of a JUnit report. */
function readReport(xml: string): { name: string; line: number; time: number; failed: boolean; skipped: boolean }[] {
  const cases = xml.matchAll(
    /<testcase name="([^"]*)" classname="[^"]*" time="([\d.]+)"(?: line="(\d+)")?[^>]*>([^]*?)<\/testcase>/g,
  );
  return Array.from(cases, ([, name, time, line, rest]) => ({
    name: name!.replace(
      /&(?:#x([\da-f]+)|#(\d+)|(\w+));/gi,
      (_, hex, number, entity) =>
        entity ? ENTITIES[entity] ?? "" : String.fromCodePoint(hex ? parseInt(hex, 16) : Number(number)),
    ),
    line: Number(line),
    time: Number(time),
    failed: /<(?:failure|error)\b/.test(rest!),
    skipped: /<skipped\b/.test(rest!),
  }));
}

/** Runs all tests without a change. Those that fail can notice nothing. */
async function findTests(workshop: Workshop, copy: string): Promise<Test[]> {
  const outcome = await workshop.run(copy, "server_test.ts", 600);
  const sections = sectionsOf(Deno.readTextFileSync(`${copy}/server_test.ts`));
  const tests = readReport(outcome.report).filter(({ skipped }) => !skipped)
    .map(({ name, line, time, failed }) => ({ name, section: sectionAt(sections, line), time, isSound: !failed }));
  if (tests.length === 0) throw new Error(`The tests do not run:\n${outcome.output}`);
  return tests;
}

interface Result {
  readonly change: Change;
  /** The test that noticed it, or what else happened; undefined if nobody did. */
  readonly noticedBy: string | undefined;
}

/** Tries changes, several at a time. */
class Trial {
  readonly #sections: ReturnType<typeof sectionsOf>;
  /** How often a test has noticed changes of a section. */
  readonly #merits = new Map<string, number>();

  constructor(
    readonly workshop: Workshop,
    readonly source: string,
    readonly tests: readonly Test[],
    readonly limit: number,
  ) {
    this.#sections = sectionsOf(source);
  }

  /** Names of the tests: those that noticed much here first, then those of this section, and the quick ones first. */
  #orderFor(section: string): string[] {
    const rank = ({ name, section: own, time }: Test) =>
      (this.#merits.get(`${section} ${name}`) ?? 0) * 1000 + (own === section ? 100 : 0) - time;
    return this.tests.filter(({ isSound }) => isSound).sort((a, b) => rank(b) - rank(a)).map(({ name }) => name);
  }

  async run(copy: string, change: Change): Promise<Result & { output: string }> {
    const { source } = this, section = sectionAt(this.#sections, lineOf(source, change.at));
    Deno.writeTextFileSync(
      `${copy}/server.ts`,
      source.slice(0, change.at) + change.after + source.slice(change.at + change.before.length),
    );
    const attempt = (names: readonly string[]) => {
      Deno.writeTextFileSync(`${copy}/order.json`, JSON.stringify(names));
      return this.workshop.run(copy, "ordered_test.ts", this.limit, "--fail-fast");
    };
    const doubtful = new Set<string>();
    for (;;) {
      const names = this.#orderFor(section).filter((name) => !doubtful.has(name));
      const { success, isLate, report, output } = await attempt(names);
      if (success) return { change, noticedBy: undefined, output };
      if (isLate) return { change, noticedBy: "the time limit", output };
      const name = readReport(report).find(({ failed }) => failed)?.name;
      if (name === undefined) return { change, noticedBy: "the program, which does not start or ends", output };
      // What fails by chance, because the machine is busy, has noticed nothing.
      if (doubtful.size < 3 && (await attempt([name])).success) doubtful.add(name);
      else {
        this.#merits.set(`${section} ${name}`, (this.#merits.get(`${section} ${name}`) ?? 0) + 1);
        return { change, noticedBy: name, output };
      }
    }
  }
}

/** The changes that a seed chooses: no two of one token, unless they are asked for. */
function choose(
  source: string,
  seed: number,
  count: number,
  { only, wanted, hasPackages }: { only: string | undefined; wanted: string | undefined; hasPackages: boolean },
): Change[] {
  const sections = sectionsOf(source), equivalent = new Set(EQUIVALENT.map(([change]) => change));
  if (only !== undefined && !sections.some(({ name }) => name === only)) {
    throw new Error(`There is no section "${only}": ${sections.map(({ name }) => name).join(", ")}`);
  }
  const seen = new Set<number>();
  return shuffle(changesOf(source), seed)
    .filter((change) => only === undefined || sectionAt(sections, lineOf(source, change.at)) === only)
    .filter((change) => wanted === undefined || nameOf(source, change).includes(wanted))
    .filter(({ at }) => wanted !== undefined || !seen.has(at) && seen.add(at))
    .filter((change) => !equivalent.has(nameOf(source, change)) && !equivalent.has(textOf(source, change)))
    .filter(({ at }) => hasPackages || !WITH_PACKAGE.includes(functionAt(source, at)))
    .slice(0, count);
}

async function main(): Promise<void> {
  const argument = (name: string) => Deno.args[Deno.args.indexOf(`--${name}`) + 1 || Infinity];
  const seed = Number(argument("seed") ?? Date.now() % 1e6), wanted = argument("change");
  const count = wanted === undefined ? Number(argument("count") ?? 40) : Infinity;
  const jobs = Number(argument("jobs") ?? navigator.hardwareConcurrency);
  const source = Deno.readTextFileSync(new URL("server.ts", project));
  const isWithPackages = await hasPackages();
  const changes = choose(source, seed, count, { only: argument("only"), wanted, hasPackages: isWithPackages });
  const show = (change: Change) => `${lineOf(source, change.at)}: ${nameOf(source, change)}`;
  console.log(`seed ${seed}, ${changes.length} of ${changesOf(source).length} changes`);
  if (Deno.args.includes("--list")) return console.log(changes.map(show).join("\n"));

  if (!isWithPackages) console.log(`without @std/cli, no change of ${WITH_PACKAGE.join(" and ")} is made`);
  using workshop = new Workshop(!isWithPackages);
  for (const signal of Deno.build.os === "windows" ? ["SIGINT"] as const : ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    Deno.addSignalListener(signal, () => {
      workshop[Symbol.dispose]();
      Deno.exit(130);
    });
  }
  const copies = Array.from({ length: Math.min(jobs, changes.length) }, (_, i) => workshop.makeCopy(`${i}`));
  const tests = await findTests(workshop, copies[0]!);
  const unsound = tests.filter(({ isSound }) => !isSound);
  const seconds = tests.reduce((sum, { time }) => sum + time, 0), longest = Math.max(...tests.map(({ time }) => time));
  console.log(`${tests.length} tests in ${Math.round(seconds)} s, the longest takes ${Math.round(longest)} s`);
  for (const { name } of unsound) console.log(`fails without any change, and is left out: ${name}`);

  const trial = new Trial(workshop, source, tests, 10 + longest * 4), results: Result[] = [], waiting = [...changes];
  const lane = async (copy: string) => {
    for (let change; (change = waiting.shift()) !== undefined;) {
      const result = await trial.run(copy, change), { noticedBy, output } = result;
      results.push(result);
      console.log(`${noticedBy === undefined ? "SURVIVES" : "noticed "} ${show(change)}`);
      if (noticedBy !== undefined) console.log(`           by ${noticedBy}`);
      if (Deno.args.includes("--verbose")) console.log(output);
    }
  };
  await Promise.all(copies.map(lane));
  const survivors = results.filter(({ noticedBy }) => noticedBy === undefined).map(({ change }) => change);
  console.log(`\n${survivors.length} survive:`);
  for (const change of survivors.sort((a, b) => a.at - b.at)) console.log(show(change));
  const share = Math.round((1 - survivors.length / results.length) * 1000) / 10;
  console.log(`${results.length - survivors.length} of ${results.length} noticed: ${share} %`);
}

/** Whether the packages are in reach; if not, the tests use the stand-ins. */
async function hasPackages(): Promise<boolean> {
  if (Deno.env.get("JSR_URL")?.startsWith("file:")) return false; // These are the stand-ins.
  const args = ["run", "-q", "--allow-read", "--allow-env=JSR_URL", new URL(".ci/jsr/probe.ts", project).href];
  return (await new Deno.Command(Deno.execPath(), { args, stdout: "null", stderr: "null" }).output()).success;
}

if (import.meta.main) await main();
