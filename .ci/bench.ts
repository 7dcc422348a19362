/**
 * Measures the server beside what Deno has of its own: requests a second, bytes encoded a second, the time from
 * start to first answer; and how often it knows the charset of a text. Needs nothing but Deno, and takes two minutes.
 *
 * ```sh
 * deno run -A .ci/bench.ts
 * deno run -A .ci/bench.ts --detection    # only that
 * ```
 *
 * Every server is a process of its own; the clients are in this one. All take turns in every round (A B C A B C …),
 * and a ratio is the median of the rounds' ratios to the first row of its group, so that whatever else the machine
 * does falls on all alike. Where clients are slower than servers, requests a second say little: then see how much
 * of the processor the server's process used for one request.
 *
 * @module
 */

import process from "node:process";
import { encode, serve, type ServeOptions } from "../server.ts";

const HELLO = "hello world";
const local = { hostname: "127.0.0.1", port: 0 };
const utf8 = new TextEncoder();

// ── Servers ─────────────────────────────────────────────────────────────────────────────────────

const ours = (options: ServeOptions) => (serve({ port: 0, ...options }).addr as Deno.NetAddr).port;
const theirs = (handler: () => Response | Promise<Response>) =>
  Deno.serve({ ...local, onListen: () => {} }, handler).addr.port;

/** Each starts a server and returns its port; `page` is a file. */
const SERVERS: Record<string, (page: string) => number | Promise<number>> = {
  "Deno.serve": () => theirs(() => new Response(HELLO)),
  "node:http": async () => {
    const server = (await import("node:http")).createServer((_, response) => void response.end(HELLO));
    await new Promise<void>((resolve) => server.listen(0, local.hostname, resolve));
    return (server.address() as { port: number }).port;
  },
  "bare loop": bareLoop,
  "charserve": () => ours({ body: HELLO }),
  "charserve, a string": () => ours({ routes: [[/^\/$/, () => HELLO]] }),
  "charserve, a Response": () => ours({ routes: [[/^\/$/, () => new Response(HELLO)]] }),
  "Deno.serve, readFile": (page) => theirs(async () => new Response(await Deno.readFile(page))),
  "charserve, file": (page) => ours({ root: page }),
  "charserve, file to GBK": (page) => ours({ root: page, charset: "gbk" }),
};

/** The least that answers: it counts the empty lines it reads, and writes as many copies of one answer. */
function bareLoop(): number {
  const answer = `HTTP/1.1 200 OK\r\nContent-Length: ${HELLO.length}\r\n\r\n${HELLO}`;
  const answers = utf8.encode(answer.repeat(64));
  const converse = async (conn: Deno.Conn) => {
    const buffer = new Uint8Array(65536);
    for (let count; (count = await conn.read(buffer)) !== null;) {
      let heads = 0;
      for (let at = 3; at < count; at++) if (buffer[at] === 10 && buffer[at - 2] === 10) heads++;
      await conn.write(answers.subarray(0, heads * answer.length));
    }
    conn.close();
  };
  const listener = Deno.listen(local);
  (async () => {
    for await (const conn of listener) converse(conn).catch(() => conn.close());
  })();
  return listener.addr.port;
}

/** Another process of Deno, which writes numbers, each at the end of a line. */
class Child implements AsyncDisposable {
  static readonly running = new Set<Child>();
  readonly #process: Deno.ChildProcess;
  readonly #stdin: WritableStreamDefaultWriter<Uint8Array>;
  readonly #stdout: ReadableStreamDefaultReader<string>;
  #text = "";

  constructor(...args: string[]) {
    const command = new Deno.Command(Deno.execPath(), {
      args: ["run", "-q", ...args],
      stdin: "piped",
      stdout: "piped",
    });
    this.#process = command.spawn();
    Child.running.add(this);
    this.#stdin = this.#process.stdin.getWriter();
    this.#stdout = this.#process.stdout.pipeThrough(new TextDecoderStream()).getReader();
  }

  async number(): Promise<number> {
    let found;
    // An address ends in its port and a slash.
    while (!(found = /(\d[\d.]*)\/?\n/.exec(this.#text))) {
      const { value } = await this.#stdout.read();
      if (value === undefined) throw new Error("a process that is measured has ended");
      this.#text += value;
    }
    this.#text = this.#text.slice(found.index + found[0].length);
    return Number(found[1]);
  }

  /** What it has used of the processor so far, in microseconds. */
  async processorTime(): Promise<number> {
    await this.#stdin.write(utf8.encode("\n"));
    return await this.number();
  }

  kill(): void {
    Child.running.delete(this);
    try {
      this.#process.kill();
    } catch { /* It has ended by itself. */ }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.kill();
    await Promise.allSettled([this.#stdin.close(), this.#stdout.cancel(), this.#process.status]);
  }
}

// ── Clients ─────────────────────────────────────────────────────────────────────────────────────

/**
 * `depth` requests are sent at once, before their answers are read. `fields` come after Host; seven zeros in them, or in
 * the target, become a number, another one in each request. `fresh`: every request has a connection of its own.
 */
type Load = { connections: number; depth?: number; target?: string; fields?: string; fresh?: boolean };

/** Makes a function that finds how long the answer at `at` is: 0 if it is not whole yet. */
function framing(): (bytes: Uint8Array, at: number, end: number) => number {
  let head = 0, whole = Infinity;
  return (bytes, at, end) => {
    // Answers of one server are alike. To read each head in full would make the clients slower than the servers.
    const stop = at + head;
    if (at + whole <= end && bytes[at + 9] === 50 && bytes[stop - 3] === 10 && bytes[stop - 1] === 10) return whole;
    const text = new TextDecoder("latin1").decode(bytes.subarray(at, end));
    head = text.indexOf("\r\n\r\n") + 4;
    if (head < 4) return 0;
    const length = /^HTTP\/1\.1 200 [^]*?\r\ncontent-length: *(\d+)\r\n/i.exec(text.slice(0, head))?.[1];
    if (length === undefined) throw new Error(`not an answer that can be counted:\n${text.slice(0, head)}`);
    whole = head + Number(length);
    return at + whole <= end ? whole : 0;
  };
}

/** Sends requests and reads their answers until `isOver`. Callbacks: they cost less than `await`. */
function converse(conn: Deno.Conn, batch: Uint8Array, depth: number, isOver: () => boolean): Promise<void> {
  return new Promise((resolve, reject) => {
    const lengthOf = framing();
    const buffer = new Uint8Array(65536);
    let filled = 0, owed = 0;
    const ask = () => {
      owed = depth;
      conn.write(batch).catch(reject);
      read();
    };
    const read = () => void conn.read(filled ? buffer.subarray(filled) : buffer).then(take).catch(reject);
    const take = (count: number | null) => {
      if (count === null) throw new Error("the server closed a connection before it answered");
      filled += count;
      let at = 0;
      for (let length; owed > 0 && (length = lengthOf(buffer, at, filled)) > 0; owed--) at += length;
      buffer.copyWithin(0, at, filled);
      filled -= at;
      if (owed > 0) read();
      else if (isOver()) resolve();
      else ask();
    };
    ask();
  });
}

/** How many requests the server at `port` answers, and how many a second. */
async function drive(port: number, { connections, depth = 1, target = "/", fields = "", fresh = false }: Load) {
  const request = `GET ${target} HTTP/1.1\r\nHost: 127.0.0.1:${port}\r\n${fields}${
    fresh ? "Connection: close\r\n" : ""
  }\r\n`;
  const zeros = request.indexOf("0000000");
  const connect = () => Deno.connect({ ...local, port });
  const conns = await Promise.all(Array.from({ length: connections }, () => fresh ? undefined : connect()));
  let answers = 0;
  const from = performance.now();
  await Promise.all(conns.map(async (conn) => {
    const batch = utf8.encode(request.repeat(depth));
    const isOver = () => {
      answers += depth;
      if (zeros >= 0) utf8.encodeInto(String(answers).padStart(7, "0"), batch.subarray(zeros));
      return performance.now() - from >= 200;
    };
    if (conn) return await converse(conn, batch, depth, isOver);
    do {
      using conn = await connect();
      await converse(conn, batch, depth, () => true);
    } while (!isOver());
  }));
  const rate = answers / (performance.now() - from) * 1000;
  for (const conn of conns) conn?.close();
  return { answers, rate };
}

// ── Rounds and tables ───────────────────────────────────────────────────────────────────────────

/** Measures all in turn, `rounds` times; a round whose number is below 0 only warms up. Results by subject. */
async function takeTurns<S, R>(subjects: readonly S[], from: number, rounds: number, measure: (subject: S) => R) {
  const results: Awaited<R>[][] = subjects.map(() => []);
  for (let round = from; round < rounds; round++) {
    for (const [index, subject] of subjects.entries()) {
      const result = await measure(subject);
      if (round >= 0) results[index]!.push(result);
    }
  }
  return results;
}

const median = (values: readonly number[]) => values.toSorted((a, b) => a - b)[values.length >> 1]!;

function print(title: string, name: string, ...cells: string[]): void {
  console.log((title.padEnd(35) + name.padEnd(24) + cells.map((cell) => cell.padStart(15)).join("")).trimEnd());
}

/** Prints a group of rows: name, median, median ratio to the first, and what else there is to say. */
function report(title: string, names: readonly string[], results: readonly number[][], more: string[] = []): void {
  for (const [index, values] of results.entries()) {
    const ratio = median(values.map((value, round) => value / results[0]![round]!)).toFixed(2);
    print(index ? "" : title, names[index]!, Math.round(median(values)).toLocaleString("en"), ratio, more[index] ?? "");
  }
}

// ── Requests ────────────────────────────────────────────────────────────────────────────────────

/** A browser's: with Host, 15 fields. */
const BROWSER = `Connection: keep-alive
sec-ch-ua: "Chromium";v="140", "Not=A?Brand";v="24", "Google Chrome";v="140"
sec-ch-ua-mobile: ?0
sec-ch-ua-platform: "Linux"
Upgrade-Insecure-Requests: 1
User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36
Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8
Sec-Fetch-Site: none
Sec-Fetch-Mode: navigate
Sec-Fetch-User: ?1
Sec-Fetch-Dest: document
Accept-Encoding: gzip, deflate, br, zstd
Accept-Language: zh-CN,zh;q=0.9,en;q=0.8
Cookie: theme=dark; session=4f1d2c7
`.replaceAll("\n", "\r\n");

const PLAIN = ["Deno.serve", "charserve", "node:http", "bare loop"];
const FILES = ["Deno.serve, readFile", "charserve, file", "charserve, file to GBK"];
const LOADS: [title: string, load: Load, names: string[]][] = [
  // What a site sees comes first: no two heads are alike.
  ["64, each with another query", { connections: 64, target: "/?u=0000000" }, PLAIN],
  ["64, a browser's fields and a cookie", { connections: 64, fields: BROWSER.replace("4f1d2c7", "0000000") }, PLAIN],
  ["64, a page of 1 KB, another query", { connections: 64, target: "/?u=0000000", fields: BROWSER }, FILES],
  ["256, each with another query", { connections: 256, target: "/?u=0000000" }, PLAIN],
  ["1 connection", { connections: 1 }, PLAIN],
  ["64 connections", { connections: 64 }, PLAIN],
  ["64, 16 requests at once", { connections: 64, depth: 16 }, PLAIN],
  ["16, a connection for each request", { connections: 16, fresh: true }, PLAIN],
  ["64, a handler", { connections: 64 }, ["Deno.serve", "charserve, a string", "charserve, a Response"]],
  ["64, a page of 1 KB", { connections: 64 }, FILES],
];

async function measureRequests(folder: string): Promise<void> {
  const page = `${folder}/page.html`;
  await Deno.writeTextFile(page, '<!doctype html><meta charset="utf-8"><p>' + "一二三四五六七八".repeat(41));
  await using stack = new AsyncDisposableStack();
  const servers: Record<string, { child: Child; port: number }> = {};
  for (const name of Object.keys(SERVERS)) {
    const child = stack.use(new Child("-A", import.meta.filename!, "--serve", name, page));
    servers[name] = { child, port: await child.number() };
    await drive(servers[name].port, { connections: 64 });
  }
  print("REQUESTS", "", "requests/s", "ratio", "CPU µs each");
  for (const [title, load, names] of LOADS) {
    const results = await takeTurns(names.map((name) => servers[name]!), 0, 7, async ({ child, port }) => {
      const before = await child.processorTime();
      const { answers, rate } = await drive(port, load);
      return { rate, cost: (await child.processorTime() - before) / answers };
    });
    const costs = results.map((rounds) => median(rounds.map(({ cost }) => cost)).toFixed(1));
    report(title, names, results.map((rounds) => rounds.map(({ rate }) => rate)), costs);
  }
}

// ── Encoders ────────────────────────────────────────────────────────────────────────────────────

/** Charsets, and words of which texts are made, mixed with ASCII. */
const CHINESE = "超文本传输 协议 是一种 用于分布式 协作式 和 超媒体 信息系统 的 应用层协议 字符编码";
const WORDS: Record<string, string> = {
  "gbk": CHINESE,
  "gb18030": `${CHINESE} 😀 ñandú`,
  "big5": "超文本 傳輸協定 是一種 用於分散式 協作式 和 超媒體 資訊系統 的 應用層協定 字元編碼",
  "shift_jis": "文字コード を 選べる 小さな ウェブサーバー です ハイパーテキスト の 転送 ﾃｷｽﾄ",
  "euc-kr": "문자 집합을 고르는 작은 웹 서버 하이퍼텍스트 전송 규약 글자가 깨지지 않는다",
  "windows-1251": "Маленький веб-сервер который отдаёт текст в любой кодировке без ошибок и «потерь»",
};
const ASCII = '<p> </p> <a href="/index.html"> charset HTTP/1.1 200 2026-01-31 , .';

/** About 1 MB (in UTF-8), the same every time. */
function textOf(label: string): string {
  const words = `${WORDS[label]} ${ASCII}`.split(" ").map((word) => ({ word, size: utf8.encode(word).length }));
  const text: string[] = [];
  for (let size = 0, seed = 1; size < 1e6;) {
    seed = Math.imul(seed, 1103515245) + 12345 >>> 0;
    const next = words[(seed >>> 16) % words.length]!;
    text.push(next.word), size += next.size;
  }
  return text.join("");
}

async function measureEncoders(): Promise<void> {
  const encoders: Record<string, (text: string, label: string) => Uint8Array> = {
    "TextEncoder (UTF-8)": (text) => utf8.encode(text),
    "charserve": encode,
  };
  print("\nENCODERS, 1 MB of mixed text", " ", "MB/s", "ratio", "first use, ms");
  try {
    // What programs for Node use. Not a package that anything here depends on.
    // deno-lint-ignore no-import-prefix
    const { default: iconv } = await import("npm:iconv-lite@^0.7");
    encoders["iconv-lite"] = (text, label) => iconv.encode(text, label);
  } catch {
    print("", "iconv-lite", "not reached");
  }
  for (const label of Object.keys(WORDS)) {
    const text = textOf(label), size = utf8.encode(text).length;
    if (new TextDecoder(label).decode(encode(text, label)) !== text) throw new Error(`${label} loses text`);
    const results = await takeTurns(Object.values(encoders), -2, 11, (encoder) => {
      const from = performance.now();
      for (let times = 0; times < 4; times++) encoder(text, label);
      return 4 * size / 1000 / (performance.now() - from);
    });
    // Tables are made on first use: in a process that is new.
    const [first] = await takeTurns([label], 0, 5, async () => {
      await using child = new Child("-A", import.meta.filename!, "--first", label);
      return await child.number();
    });
    report(label, Object.keys(encoders), results, ["", median(first!).toFixed(1)]);
  }
}

// ── Start ───────────────────────────────────────────────────────────────────────────────────────

async function measureStart(folder: string): Promise<void> {
  const server = import.meta.resolve("../server.ts");
  const onListen = "const onListen = ({ port }) => console.log(port);";
  const handler = `const handler = () => new Response("${HELLO}");`;
  const theirs = [onListen, handler, `Deno.serve({ port: 0, hostname: "127.0.0.1", onListen }, handler);`];
  const ours = [`import { serve } from "${server}";`, onListen, `serve({ port: 0, body: "${HELLO}", onListen });`];
  await Deno.writeTextFile(`${folder}/theirs.ts`, theirs.join("\n"));
  await Deno.writeTextFile(`${folder}/ours.ts`, ours.join("\n"));
  const commands = {
    "Deno.serve, 3 lines": [`${folder}/theirs.ts`],
    "charserve, 3 lines": [`${folder}/ours.ts`],
    "server.ts --body": [server, "--port=0", "--log=none", `--body=${HELLO}`],
  };
  // The first round fills Deno's caches of compiled code.
  const results = await takeTurns(Object.values(commands), -1, 9, async (args) => {
    const from = performance.now();
    await using child = new Child("--allow-net", ...args);
    using conn = await Deno.connect({ ...local, port: await child.number() });
    await converse(conn, utf8.encode("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), 1, () => true);
    return performance.now() - from;
  });
  print("\nSTART", " ", "ms", "ratio");
  report("deno run to the first 200", Object.keys(commands), results);
}

// ── Detection ───────────────────────────────────────────────────────────────────────────────────

/** A text, what it is to be stored in, and what kind of text it is. */
type Sample = { charset: string; lang: string; kind?: string; text: string };

/** How many of the texts in `.ci/texts`, which nothing was fitted to, are read right when they do not say their charset. */
async function measureDetection(): Promise<void> {
  await using lab = new Child("--allow-net", import.meta.resolve("../server.ts"), "--port=0", "--log=none");
  const url = `http://127.0.0.1:${await lab.number()}/detect`;
  const isRight = async ({ charset, text }: Sample, length: number) => {
    const bytes = encode(withMarks(text, charset), charset).subarray(0, length);
    const [best] = await (await fetch(url, { method: "POST", body: bytes })).json();
    const read = (name: string) => new TextDecoder(name).decode(bytes).slice(0, 1000).toWellFormed();
    return best === undefined || read(best.charset) === read(charset);
  };
  print("\nDETECTION", " ", "texts", "right");
  const prose: Sample[] = await readTexts("prose"), hard: Sample[] = await readTexts("hard");
  const rows: [string, Sample[], number][] = [40, 200, 2000].map((length) => [`cut at ${length} bytes`, prose, length]);
  for (const [name, samples, length] of [...rows, ["titles, menus, names, a letter", hard, 1e6] as const]) {
    let right = 0;
    for (const sample of samples) if (await isRight(sample, length)) right++;
    print(name, " ", String(samples.length), `${(right / samples.length * 100).toFixed(1)} %`);
  }
}

const readTexts = async (name: string) =>
  JSON.parse(await Deno.readTextFile(new URL(`./texts/${name}.json`, import.meta.url)));

/** windows-1258 writes a letter and then its tone. */
function withMarks(text: string, charset: string): string {
  if (charset !== "windows-1258") return text;
  return text.normalize("NFD").replace(/(\p{L})([\u0302\u0306\u031b])/gu, (both) => both.normalize("NFC"));
}

// ── Which process is this? ──────────────────────────────────────────────────────────────────────

const [role, name = "", page = ""] = Deno.args;
if (role === "--serve") {
  console.log(await SERVERS[name]!(page));
  for await (const _ of Deno.stdin.readable) {
    const { user, system } = process.cpuUsage();
    console.log(user + system);
  }
  // Whoever asked is gone.
  Deno.exit();
} else if (role === "--first") {
  const from = performance.now();
  encode(WORDS[name]!, name);
  console.log(performance.now() - from);
} else {
  const folder = await Deno.makeTempDir();
  const end = (status: number, reason = "") => {
    for (const child of Child.running) child.kill();
    Deno.removeSync(folder, { recursive: true });
    if (reason) console.error(reason);
    Deno.exit(status);
  };
  Deno.addSignalListener("SIGINT", () => end(130));
  setTimeout(end, 300_000, 1, "A server hangs, or the machine is too busy to measure on.");
  console.log(`Deno ${Deno.version.deno}, ${Deno.build.target}, ${navigator.hardwareConcurrency} threads\n`);
  try {
    if (role !== "--detection") {
      await measureRequests(folder);
      await measureEncoders();
      await measureStart(folder);
    }
    await measureDetection();
  } catch (error) {
    end(1, String(error));
  }
  end(0);
}
