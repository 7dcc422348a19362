/**
 * Asks a server for files that change meanwhile, as fast as a worker (mischief.ts) can change them, and holds each answer
 * to this: it is a state that the file had, while the request was under way or a moment before; the state's tag was no
 * other state's; and no byte, and no name, is from outside ROOT.
 *
 * @module
 */

import { serve, type Server } from "../server.ts";
import { Client, insist, latin1, type Reply, Violation } from "./client.ts";
import {
  growthLine,
  type History,
  HISTORY_LENGTH,
  insideText,
  longText,
  type Orders,
  SECRET,
  SWAPPED,
  VERSIONED,
  type Versioned,
  versionText,
} from "./mischief.ts";

/** For how long the server may believe what it saw, and how long it may take to say it on a busy machine, in milliseconds. */
const STALENESS = 400;

const LINE_LENGTH = growthLine(0).length;

/** A file that is asked for. */
interface Wild {
  readonly target: string;
  /** The text of a state that has so many bytes, and of which this is a part; undefined if there never was one. */
  readonly textOf: (part: string, length: number) => string | undefined;
  /** Its versions, if they are told apart. */
  readonly history?: History;
  /** It may be gone: another thing is in its place, or nothing. */
  readonly mayBeGone?: boolean;
  /** It may be told to be under way to another state: 503. */
  readonly mayBeBusy?: boolean;
  /** It takes long; the connection may end amid its content. */
  readonly isLarge?: boolean;
}

/** What has been seen, and how often. */
type Tally = Map<string, number>;

const FOLDER_NAMES = ["first.txt", "in.txt", "last.txt"];

/** A folder `wild` that is served, and beside it a folder `secret`, and what is needed to swap them. */
async function makeWild(pipes: boolean): Promise<string> {
  const base = await Deno.realPath(await Deno.makeTempDir({ prefix: "wild-" }));
  const write = (path: string, text: string) => Deno.writeTextFile(`${base}/${path}`, text);
  for (
    const folder of [
      "wild/folder",
      "wild/deep/q/r",
      "secret/q/r",
      "releases/1",
      "releases/2",
      "aside",
      "links",
      "locked",
    ]
  ) await Deno.mkdir(`${base}/${folder}`, { recursive: true });
  for (const path of ["a.txt", "file.txt", "packed.txt", "404.html", "deep/q/r/s.txt"]) {
    await write(`wild/${path}`, insideText(path));
  }
  for (const name of FOLDER_NAMES) await write(`wild/folder/${name}`, insideText(`folder/${name}`));
  await write("wild/large.txt", longText("large.txt"));
  await write("wild/growing.txt", "");
  for (const kind of VERSIONED) await write(`wild/${kind}.txt`, versionText(0));
  await new Blob([insideText("packed.txt")]).stream().pipeThrough(new CompressionStream("gzip"))
    .pipeTo((await Deno.create(`${base}/wild/packed.txt.gz`)).writable);
  for (const name of ["in.txt", "q/r/s.txt", "index.htm", `${SECRET}.txt`]) {
    await write(`secret/${name}`, `${SECRET}\n`.repeat(100));
  }
  await write("secret/large.txt", `${SECRET}\n`.repeat(100_000));
  for (const release of [1, 2]) await write(`releases/${release}/page.txt`, insideText(`release ${release}`));
  await Deno.symlink("releases/1", `${base}/current`);
  await Deno.symlink("a.txt", `${base}/wild/link.txt`);
  for (const [path, instead] of SWAPPED) await Deno.symlink(`${base}/${instead}`, `${base}/links/${path}`);
  if (pipes) await new Deno.Command("mkfifo", { args: [`${base}/pipe`] }).output();
  return base;
}

const fixed = (text: string) => (_: string, length: number) => length === text.length ? text : undefined;

function versionedText(part: string, length: number): string | undefined {
  if (length === 0) return "";
  const number = /version (\d{9})/.exec(part)?.[1] ?? "0", text = versionText(Number(number));
  return length === text.length ? text : undefined;
}

let growth = "";

/** The system shows what is appended page by page: any length is a state. */
function grownText(_: string, length: number): string {
  while (growth.length < length) growth += growthLine(growth.length / LINE_LENGTH);
  return growth.slice(0, length);
}

function wildFiles(histories: Orders["histories"]): readonly Wild[] {
  const swapped = (target: string, path = target.slice(1)): Wild => (
    { target, textOf: fixed(insideText(path)), mayBeGone: true, mayBeBusy: true }
  );
  return [
    ...Array.from({ length: 6 }, () => swapped("/folder/in.txt")),
    swapped("/deep/q/r/s.txt"),
    swapped("/file.txt"),
    swapped("/link.txt", "a.txt"),
    { target: "/packed.txt", textOf: fixed(insideText("packed.txt")) },
    {
      target: "/large.txt",
      textOf: fixed(longText("large.txt")),
      mayBeGone: true,
      mayBeBusy: true,
      isLarge: true,
    },
    { target: "/growing.txt", textOf: grownText, mayBeBusy: true, mayBeGone: true },
    ...[...VERSIONED, ...VERSIONED].map((kind): Wild => ({
      target: `/${kind}.txt`,
      textOf: versionedText,
      history: histories[kind],
      mayBeBusy: true,
    })),
  ];
}

const pick = <T>(list: readonly T[]): T => list[Math.floor(Math.random() * list.length)]!;
const chance = (probability: number) => Math.random() < probability;

async function unpack(content: Uint8Array<ArrayBuffer>, coding: string | undefined): Promise<Uint8Array> {
  if (coding === undefined) return content;
  const stream = new DecompressionStream(coding === "br" ? "brotli" as "gzip" : "gzip");
  return await new Response(new Blob([content]).stream().pipeThrough(stream)).bytes();
}

/** One state of a representation: what has its tag has this, and what has this need not have its tag. */
interface Tagged {
  readonly state: string;
  readonly version: number | undefined;
}

/** Asks for one file after another, and looks at what comes. */
class Watch {
  readonly #tags = new Map<string, Tagged>();
  readonly #lastTags = new Map<string, string>();

  constructor(readonly server: Server, readonly files: readonly Wild[], readonly tally: Tally) {}

  /** Some requests on one connection. */
  async ask(): Promise<void> {
    using client = await Client.connect(this.server);
    for (let left = 1 + Math.floor(Math.random() * 20); left > 0; left--) {
      const file = pick(this.files);
      if (file.isLarge && chance(0.8)) continue;
      try {
        await this.#askFor(client, file);
      } catch (error) {
        if (error instanceof Violation) throw new Violation(`${file.target}: ${error.message}`);
        const what = `${this.#asked}: ${(error as Error).message}`;
        insist(!client.closed, `no answer in time to ${what}`);
        insist(file.isLarge, what);
        this.#count(`${file.target} broken off`);
        break;
      }
    }
  }

  #count(what: string): void {
    this.tally.set(what, (this.tally.get(what) ?? 0) + 1);
  }

  /** The last request, to be told of. */
  #asked = "";

  async #askFor(client: Client, file: Wild): Promise<void> {
    const method = chance(0.1) ? "HEAD" : "GET", charset = chance(0.15) ? "utf-16be" : undefined;
    const fields = [`Host: localhost`, `X: ${Math.random()}`], lastTag = this.#lastTags.get(file.target);
    if (chance(0.3)) fields.push("Accept-Encoding: gzip");
    if (chance(0.2)) fields.push(`Range: bytes=${pick(["0-99", "-50", "100-", "5-5,7-9"])}`);
    if (chance(0.3) && lastTag !== undefined) fields.push(`${pick(["If-None-Match", "If-Range"])}: ${lastTag}`);
    const target = file.target + (charset ? `?charset=${charset}` : chance(0.3) ? `?${Math.random()}` : "");
    const begin = Date.now();
    this.#asked = `${method} ${target} (${fields.slice(2).join(", ")})`;
    await client.send(`${method} ${target} HTTP/1.1\r\n${fields.join("\r\n")}\r\n\r\n`);
    const reply = await client.receive(method), { status } = reply;
    this.#count(`${file.target} ${status}`);
    insist(!latin1(reply.content).includes(SECRET), `a byte from outside ROOT: ${fields.join(", ")}`);
    const what = `${status} to ${method} ${target} (${fields.slice(2).join(", ")})`;
    const isGone = status === 404 && file.mayBeGone || status === 503 && file.mayBeBusy;
    insist([200, 206, 304, 416].includes(status) || isGone, what);
    const tag = reply.fields.get("etag");
    if (tag === undefined) return;
    this.#lastTags.set(file.target, tag);
    if (status === 304) this.#checkTime(file, this.#tags.get(`${file.target} ${tag}`)?.version, begin, what);
    else if (method === "GET" && status !== 416) await this.#checkContent(file, reply, tag, charset, begin, what);
  }

  async #checkContent(
    file: Wild,
    { content, status, fields }: Reply,
    tag: string,
    charset: string | undefined,
    begin: number,
    what: string,
  ): Promise<void> {
    const coding = fields.get("content-encoding"),
      range = /^bytes (\d+)-\d+\/(\d+)$/.exec(fields.get("content-range") ?? "");
    if (status === 206 && (coding !== undefined || range === null)) return;
    const width = charset === undefined ? 1 : 2, start = Number(range?.[1] ?? 0);
    if (status === 206 && width > 1) return;
    const text = new TextDecoder(charset).decode(await unpack(content, coding));
    const whole = file.textOf(text, range === null ? text.length : Number(range[2]));
    insist(
      whole !== undefined && text === whole.slice(start, start + text.length),
      `the file never was like that: ${JSON.stringify(text.slice(0, 60))}… of ${range?.[2] ?? text.length}, ${what}`,
    );
    const version = file.history && Number(/version (\d{9})/.exec(text)?.[1] ?? NaN);
    if (!Number.isNaN(version)) this.#checkTime(file, version, begin, what);
    // A part may have too little of the file to tell which state it is of.
    if (status === 206 && file.history) return;
    const state = `${whole.length} ${version} ${charset} ${coding}`,
      key = `${file.target} ${tag}`,
      known = this.#tags.get(key);
    insist(known === undefined || known.state === state, `the tag ${tag} of ${known?.state} is also that of ${state}`);
    if (this.#tags.size > 200_000) this.#tags.clear();
    this.#tags.set(key, { state, version: Number.isNaN(version) ? undefined : version });
  }

  /** Whether a version was there while the request was under way. */
  #checkTime({ history }: Wild, version: number | undefined, begin: number, what: string): void {
    if (history === undefined || version === undefined) return;
    const ended = version < history[0]! ? history[version + 1]! : Infinity;
    insist(ended >= begin - STALENESS, `version ${version} ended ${begin - ended} ms before: ${what}`);
  }

  /** A listing shows names of the folder, or there is none. */
  async askForListing(): Promise<void> {
    using client = await Client.connect(this.server);
    const query = pick(["", "?sort=size", "?q=in", "?q=CANARY", "?q=t&text=1"]);
    const accept = chance(0.5) ? "application/json" : "text/html";
    await client.send(`GET /folder/${query} HTTP/1.1\r\nHost: localhost\r\nAccept: ${accept}\r\n\r\n`);
    const { status, content } = await client.receive(), text = new TextDecoder().decode(content);
    this.#count(`/folder/ ${status}`);
    insist(!text.includes(SECRET), `/folder/${query} lists a name from outside ROOT`);
    insist([200, 404, 503].includes(status), `${status} to /folder/${query}`);
    if (status === 200 && query === "" && accept === "application/json") {
      const names = (JSON.parse(text) as { name: string }[]).map(({ name }) => name).join();
      insist(names === FOLDER_NAMES.join(), `/folder/ lists ${names}`);
    }
  }

  /** What is not there is answered by the page of ROOT, or by ours. */
  async askForNothing(): Promise<void> {
    using client = await Client.connect(this.server);
    await client.send(`GET /nowhere/${Math.random()} HTTP/1.1\r\nHost: localhost\r\n\r\n`);
    const { status, content } = await client.receive();
    insist(!latin1(content).includes(SECRET), "404.html is from outside ROOT");
    this.#count(`nothing ${status}`);
    insist(status === 404 || status === 503, `${status} to what is not there`);
  }

  /** Once nothing changes any more, everything is there again, and soon. */
  async settle(): Promise<void> {
    const until = Date.now() + 3000;
    for (const { target, textOf, history } of this.files) {
      for (let found = ""; found === "";) {
        using client = await Client.connect(this.server);
        await client.send(`GET ${target} HTTP/1.1\r\nHost: localhost\r\n\r\n`);
        const { status, content } = await client.receive(), text = new TextDecoder().decode(content);
        const isLast = history === undefined || text === versionText(history[0]!);
        if (status === 200 && isLast && textOf(text, text.length) === text) found = target;
        else insist(Date.now() < until, `${status}, ${text.length} bytes for ${target}, when all has settled`);
      }
    }
  }
}

/** A folder that changes all the time, and servers for it. */
export interface WildSite {
  /** Asks a few times. Throws a {@linkcode Violation}. */
  ask(): Promise<void>;
  /** Ends all changes, and sees that everything is there again. */
  stop(): Promise<void>;
  /** How often each file was answered with each status. */
  readonly tally: Tally;
}

/** Starts changing a folder. `pipes` puts pipes in the place of files, too. */
export async function startWild(pipes: boolean, onLog: (lines: string) => void): Promise<WildSite> {
  const base = await makeWild(pipes),
    worker = new Worker(new URL("./mischief.ts", import.meta.url), { type: "module" });
  const histories = Object.fromEntries(VERSIONED.map((kind) => [
    kind,
    new Float64Array(new SharedArrayBuffer(HISTORY_LENGTH * Float64Array.BYTES_PER_ELEMENT)),
  ])) as unknown as Record<Versioned, History>;
  const tally: Tally = new Map(), options = { port: 0, log: "common", onLog } as const;
  const main = new Watch(serve({ ...options, root: `${base}/wild` }), wildFiles(histories), tally);
  const page = (release: number) => insideText(`release ${release}`);
  const released = new Watch(serve({ ...options, root: `${base}/current` }), [{
    target: "/page.txt",
    textOf: (part, length) => [1, 2].map(page).find((text) => text.length === length && text.includes(part)),
  }], tally);
  const stopped = Promise.withResolvers<void>();
  worker.onmessage = ({ data }) => data === "stopped" ? stopped.resolve() : stopped.reject(new Violation(String(data)));
  stopped.promise.catch(() => {});
  worker.postMessage({ base, histories, pipes } satisfies Orders);
  return {
    tally,
    ask() {
      const which = Math.random();
      if (which < 0.1) return released.ask();
      return which < 0.2 ? main.askForListing() : which < 0.25 ? main.askForNothing() : main.ask();
    },
    async stop() {
      worker.postMessage("stop");
      try {
        await stopped.promise;
        await main.settle();
        await released.settle();
      } finally {
        worker.terminate();
        // What still waits for a pipe to be written to, need not.
        using _ = pipes ? await Deno.open(`${base}/pipe`, { read: true, write: true }) : undefined;
        await Promise.all([main, released].map(({ server }) => server.shutdown()));
        await Deno.remove(base, { recursive: true });
      }
    },
  };
}
