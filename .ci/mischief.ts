/**
 * A worker that changes a folder as fast as it can, while the fuzzer asks for what is in it: swaps folders and files for
 * links that lead out, and for pipes, and back; lets files grow; writes them over. What is in them is known, so that of
 * each answer it can be said whether the file ever was like that, and when.
 *
 * @module
 */

/** What must never be sent: it is outside ROOT. Names there begin with it, too. */
export const SECRET = "CANARY-" + "d0-not-read";

/** Of each kind of files with versions: when each version began, in milliseconds. The number of the last one stands first. */
export type History = Float64Array<SharedArrayBuffer>;

/** What the worker is given. */
export interface Orders {
  /** The folder that holds all of it. */
  readonly base: string;
  readonly histories: Readonly<Record<Versioned, History>>;
  /** Whether pipes are among what is put in the place of files. */
  readonly pipes: boolean;
}

/** Files that are written again and again: replaced by others, written over in place, and emptied first. */
export const VERSIONED = ["replaced", "overwritten", "emptied"] as const;
/** One of them. */
export type Versioned = typeof VERSIONED[number];

/** Most versions that a history has room for. */
export const HISTORY_LENGTH = 1 << 20;
/** Their one time of modification, in milliseconds: it says nothing. */
const FORCED_TIME = new Date(1_700_000_000_000);

/** What a file has in one version: always as many bytes, few enough to be written at once. */
export function versionText(version: number): string {
  return `version ${version.toString().padStart(9, "0")}\n`.repeat(200);
}

/** Lines that a growing file has, from the first on. */
export function growthLine(number: number): string {
  return `line ${number.toString().padStart(9, "0")}${" ".repeat(84)}\n`;
}

/** Text that a file has which is swapped: it says what it is. */
export function insideText(path: string): string {
  return `inside of ${path}\n`.repeat(100);
}

/** Long enough to be streamed. */
export function longText(path: string): string {
  return `${path}: ${"x".repeat(1000)}\n`.repeat(1100);
}

/** Things of `wild` that are swapped: the path of each, and what is put in its place, beside ROOT. */
export const SWAPPED: readonly (readonly [path: string, instead: string])[] = [
  ["folder", "secret"],
  ["deep", "secret"],
  ["file.txt", "secret/in.txt"],
  ["large.txt", "secret/large.txt"],
  ["packed.txt.gz", "secret/in.txt"],
  ["404.html", "secret/in.txt"],
];

const below = (limit: number) => Math.floor(Math.random() * limit);

/** Lets some time pass, busily: waits that the system gives are too long. */
function spin(microseconds: number): void {
  for (const until = performance.now() + microseconds / 1000; performance.now() < until;);
}

/** Puts a link or a pipe in the place of something, and that back. */
function swap(base: string, path: string, instead: string, hold: number): void {
  const place = `${base}/wild/${path}`, aside = `${base}/aside/${path}`, other = `${base}/${instead}`;
  Deno.renameSync(place, aside);
  Deno.renameSync(other, place);
  spin(hold);
  Deno.renameSync(place, other);
  Deno.renameSync(aside, place);
  spin(below(hold + 1));
}

/** Points a link elsewhere, in one step. */
function pointLink(base: string, link: string, to: string): void {
  Deno.symlinkSync(to, `${base}/new-link`);
  Deno.renameSync(`${base}/new-link`, `${base}/${link}`);
}

/** Puts a new version into a file. */
function rewrite(base: string, kind: Versioned, history: History): void {
  const version = history[0]! + 1,
    path = `${base}/wild/${kind}.txt`,
    bytes = new TextEncoder().encode(versionText(version));
  if (version >= HISTORY_LENGTH) return;
  history[version] = Date.now();
  history[0] = version;
  if (kind === "emptied") Deno.writeFileSync(path, bytes);
  else if (kind === "replaced") {
    Deno.writeFileSync(`${base}/new-file`, bytes);
    Deno.utimeSync(`${base}/new-file`, FORCED_TIME, FORCED_TIME);
    Deno.renameSync(`${base}/new-file`, path);
  } else {
    using file = Deno.openSync(path, { write: true });
    file.writeSync(bytes);
    file.utimeSync(FORCED_TIME, FORCED_TIME);
  }
}

/** Lines that the growing file has by now. */
let lines = 0;

/** Appends some lines; a file that is too long is replaced by an empty one. */
function grow(base: string): void {
  const path = `${base}/wild/growing.txt`;
  if (lines > 15_000) {
    lines = 0;
    Deno.writeTextFileSync(`${base}/new-file`, "");
    return Deno.renameSync(`${base}/new-file`, path);
  }
  const count = 1 + below(300), text = Array.from({ length: count }, (_, i) => growthLine(lines + i)).join("");
  Deno.writeTextFileSync(path, text, { append: true });
  lines += count;
}

/** A while of one kind of change, in one rhythm. */
function change({ base, histories, pipes }: Orders): void {
  const times = below(20), hold = below(3) === 0 ? below(400) : 0, kind = below(10);
  const [path, instead] = SWAPPED[below(SWAPPED.length)]!, versioned = VERSIONED[below(VERSIONED.length)]!;
  for (let i = 0; i < times * 2; i++) {
    if (kind < 4) swap(base, path, `links/${path}`, hold);
    else if (kind === 4 && pipes) swap(base, "file.txt", "pipe", hold);
    else if (kind === 5) pointLink(base, "wild/link.txt", i % 2 === 1 ? "a.txt" : `../${instead}`), spin(hold);
    else if (kind === 6) pointLink(base, "current", `releases/${i % 2 + 1}`), spin(hold);
    else if (kind === 7) grow(base), spin(hold);
    else rewrite(base, versioned, histories[versioned]), spin(hold);
  }
}

// As the worker's own program: told what to do, and, with anything else, to stop.
const scope = globalThis as unknown as {
  onmessage: ((event: MessageEvent<Orders | "stop">) => void) | null;
  postMessage?: (message: string) => void;
  WorkerGlobalScope?: unknown;
};
if (scope.WorkerGlobalScope !== undefined) {
  let orders: Orders | undefined;
  const goOn = () => {
    if (orders === undefined) return;
    try {
      for (let i = 0; i < 10; i++) change(orders);
      setTimeout(goOn);
    } catch (error) {
      scope.postMessage?.(`${(error as Error).stack}`);
    }
  };
  scope.onmessage = ({ data }) => {
    if (data === "stop") orders = undefined, scope.postMessage?.("stopped");
    else orders = data, goOn();
  };
}
