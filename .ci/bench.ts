/**
 * Measures the server beside what Deno has of its own: requests a second, bytes encoded a second, and the
 * time from start to first answer. Needs nothing but Deno, and takes a minute and a half.
 *
 * ```sh
 * deno run -A .ci/bench.ts
 * ```
 *
 * Servers are processes of their own; the clients are in this one. All take turns in every round (A B C A B C …),
 * and a ratio is the median of the rounds' ratios, so that whatever else the machine does meanwhile falls on
 * all alike. Where the clients are slower than the server, requests a second say less than the last column:
 * what the server's process used of the processor for one request.
 *
 * @module
 */

import process from "node:process";
import { encode, serve, type ServeOptions } from "../server.ts";

const ROUNDS = 5;
const SECONDS = 0.4;
const HELLO = "hello world";
const utf8 = new TextEncoder();

// ── Servers ─────────────────────────────────────────────────────────────────────────────────────

const local = { hostname: "127.0.0.1", port: 0 };
const ours = (options: ServeOptions) => (serve({ port: 0, ...options }).addr as Deno.NetAddr).port;
const deno = (handler: () => Response | Promise<Response>) =>
  Deno.serve({ ...local, onListen: () => {} }, handler).addr.port;

/** Each starts a server and returns its port; `page` is a file. */
const SERVERS: Record<string, (page: string) => number | Promise<number>> = {
  "Deno.serve": () => deno(() => new Response(HELLO)),
  "node:http": async () => {
    const server = (await import("node:http")).createServer((_, response) => void response.end(HELLO));
    await new Promise<void>((resolve) => server.listen(0, local.hostname, resolve));
    return (server.address() as { port: number }).port;
  },
  "bare loop": bareLoop,
  "charserve": () => ours({ body: HELLO }),
  "charserve, a string": () => ours({ routes: [[/^\/$/, () => HELLO]] }),
  "charserve, a Response": () => ours({ routes: [[/^\/$/, () => new Response(HELLO)]] }),
  "Deno.serve, readFile": (page) =>
    deno(async () => new Response(await Deno.readFile(page), { headers: { "Content-Type": "text/html" } })),
  "charserve, file": (page) => ours({ root: page }),
  "charserve, file to GBK": (page) => ours({ root: page, charset: "gbk" }),
};

/** The least that answers: it counts the empty lines it reads, and writes as many copies of one answer. */
function bareLoop(): number {
  const answer = utf8.encode(`HTTP/1.1 200 OK\r\nContent-Length: ${HELLO.length}\r\n\r\n${HELLO}`);
  const answers = new Uint8Array(answer.length * 64).map((_, at) => answer[at % answer.length]!);
  const converse = async (conn: Deno.Conn) => {
    const buffer = new Uint8Array(65536);
    for (let count; (count = await conn.read(buffer)) !== null;) {
      let heads = 0;
      for (let at = buffer.indexOf(13); at >= 0 && at < count; at = buffer.indexOf(13, at + 2)) {
        if (buffer[at + 2] === 13) heads++, at += 2;
      }
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

/** Another process of Deno, which speaks in lines. */
class Child implements AsyncDisposable {
  readonly #process: Deno.ChildProcess;
  readonly #lines: ReadableStreamDefaultReader<string>;
  readonly #stdin: WritableStreamDefaultWriter<Uint8Array>;
  #rest = "";

  constructor(...args: string[]) {
    const piped = { stdin: "piped", stdout: "piped", stderr: "inherit" } as const;
    this.#process = new Deno.Command(Deno.execPath(), { args: ["run", "-q", ...args], ...piped }).spawn();
    this.#lines = this.#process.stdout.pipeThrough(new TextDecoderStream()).getReader();
    this.#stdin = this.#process.stdin.getWriter();
  }

  /** The number at the end of the next line that ends in one (or in an address, with its slash). */
  async number(): Promise<number> {
    let found;
    while (!(found = /(\d[\d.]*)\/?\r?\n/.exec(this.#rest))) {
      const { value } = await this.#lines.read();
      if (value === undefined) throw new Error("a process that is measured has ended");
      this.#rest += value;
    }
    this.#rest = this.#rest.slice(found.index + found[0].length);
    return Number(found[1]);
  }

  /** What it has used of the processor so far, in microseconds. */
  async processorTime(): Promise<number> {
    await this.#stdin.write(utf8.encode("\n"));
    return await this.number();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      this.#process.kill();
    } catch { /* It has ended by itself. */ }
    await Promise.allSettled([this.#stdin.close(), this.#lines.cancel(), this.#process.status]);
  }
}

// ── Clients ─────────────────────────────────────────────────────────────────────────────────────

interface Load {
  readonly connections: number;
  /** Requests that are sent at once, before their answers are read. @default {1} */
  readonly depth?: number;
  /** Fields besides Host. A run of zeros in them is replaced with a number, another in each request. */
  readonly fields?: string;
  /** Every request has a connection of its own. */
  readonly fresh?: boolean;
}

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
    const ask = () => {
      owed = depth;
      conn.write(batch).catch(reject);
      read();
    };
    ask();
  });
}

/** How many requests the server at `port` answers, and how many a second. */
async function drive(port: number, { connections, depth = 1, fields = "", fresh = false }: Load) {
  const request = `GET / HTTP/1.1\r\nHost: 127.0.0.1:${port}\r\n${fields}${fresh ? "Connection: close\r\n" : ""}\r\n`;
  const zeros = request.indexOf("0000000");
  const connect = () => Deno.connect({ ...local, port });
  const conns = fresh ? [] : await Promise.all(Array.from({ length: connections }, connect));
  let answers = 0;
  const from = performance.now();
  const one = async (conn?: Deno.Conn) => {
    const batch = utf8.encode(request.repeat(depth));
    const isOver = () => {
      answers += depth;
      if (zeros >= 0) utf8.encodeInto(String(answers).padStart(7, "0"), batch.subarray(zeros));
      return performance.now() - from >= SECONDS * 1000;
    };
    if (conn) return await converse(conn, batch, depth, isOver);
    do {
      using conn = await connect();
      await converse(conn, batch, depth, () => true);
    } while (!isOver());
  };
  const { promise: stuck, reject } = Promise.withResolvers<never>();
  const timer = setTimeout(() => reject(new Error(`the server at port ${port} hangs`)), 20_000);
  try {
    await Promise.race([stuck, Promise.all(fresh ? Array.from({ length: connections }, () => one()) : conns.map(one))]);
    return { answers, rate: answers / (performance.now() - from) * 1000 };
  } finally {
    clearTimeout(timer);
    for (const conn of conns) conn.close();
  }
}

// ── Tables ──────────────────────────────────────────────────────────────────────────────────────

const median = (values: readonly number[]) => values.toSorted((a, b) => a - b)[values.length >> 1]!;
const medianRatio = (values: readonly number[], bases: readonly number[]) =>
  median(values.map((value, round) => value / bases[round]!)).toFixed(2);

/** One line: names to the left, numbers to the right. */
function print(title: string, name: string, ...numbers: (number | string)[]): void {
  const cells = numbers.map((cell) => typeof cell === "number" ? cell.toLocaleString("en") : cell);
  console.log(title.padEnd(36) + name.padEnd(24) + cells.map((cell) => cell.padStart(14)).join(""));
}

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
Cookie: theme=dark; session=4f1d2c
`.replaceAll("\n", "\r\n");

/** What is asked, and of whom: the first is what the others are compared with. */
const PLAIN = ["Deno.serve", "charserve", "node:http", "bare loop"];
const LOADS: [title: string, load: Load, names: string[]][] = [
  ["1 connection", { connections: 1 }, PLAIN],
  ["64 connections", { connections: 64 }, PLAIN],
  ["64, 16 requests at once", { connections: 64, depth: 16 }, PLAIN],
  ["64, a browser's 15 fields", { connections: 64, fields: BROWSER }, PLAIN],
  // Heads that are equal could be remembered.
  ["64, the same, no two alike", { connections: 64, fields: BROWSER.replace("4f1d2c", "0000000") }, PLAIN],
  ["16, a connection for each request", { connections: 16, fresh: true }, PLAIN],
  ["64, a handler", { connections: 64 }, ["Deno.serve", "charserve, a string", "charserve, a Response"]],
  ["64, a page of 1 KB", { connections: 64 }, ["Deno.serve, readFile", "charserve, file", "charserve, file to GBK"]],
];

async function measureRequests(page: string): Promise<void> {
  await using children = new AsyncDisposableStack();
  const servers: Record<string, { child: Child; port: number }> = {};
  for (const name of Object.keys(SERVERS)) {
    const child = children.use(new Child("-A", import.meta.filename!, "--serve", name, page));
    servers[name] = { child, port: await child.number() };
    await drive(servers[name].port, { connections: 64 });
  }
  print("REQUESTS", "", "requests/s", "ratio", "CPU µs each");
  for (const [title, load, names] of LOADS) {
    const rates: number[][] = names.map(() => []), costs: number[][] = names.map(() => []);
    for (let round = 0; round < ROUNDS; round++) {
      for (const [index, name] of names.entries()) {
        const { child, port } = servers[name]!;
        const before = await child.processorTime();
        const { answers, rate } = await drive(port, load);
        rates[index]!.push(rate), costs[index]!.push((await child.processorTime() - before) / answers);
      }
    }
    for (const [index, name] of names.entries()) {
      const [rate, cost] = [median(rates[index]!), median(costs[index]!)];
      print(index ? "" : title, name, Math.round(rate), medianRatio(rates[index]!, rates[0]!), cost.toFixed(1));
    }
  }
}

// ── Encoders ────────────────────────────────────────────────────────────────────────────────────

/** Charsets, and words to make texts of, which have them mixed with ASCII. */
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
  const words = `${WORDS[label]} ${ASCII}`.split(" ");
  let text = "", seed = 1;
  for (let size = 0; size < 1e6;) {
    seed = Math.imul(seed, 1103515245) + 12345 >>> 0;
    const word = words[(seed >>> 16) % words.length]! + ((seed >>> 8) % 4 ? "" : " ");
    text += word, size += utf8.encode(word).length;
  }
  return text;
}

type Encoder = (text: string, label: string) => Uint8Array;

/** The encoder that programs for Node use; only to compare with, where npm is in reach. */
async function iconvLite(): Promise<Encoder | undefined> {
  try {
    // deno-lint-ignore no-import-prefix
    const { default: iconv } = await import("npm:iconv-lite@^0.7");
    return (text, label) => iconv.encode(text, label);
  } catch {
    return undefined;
  }
}

async function measureEncoders(): Promise<void> {
  const iconv = await iconvLite();
  const encoders: Encoder[] = [encode, (text) => utf8.encode(text), ...(iconv ? [iconv] : [])];
  print(
    "\nENCODERS (MB/s of the text in UTF-8)",
    " charserve",
    "TextEncoder",
    "ratio",
    "iconv-lite",
    "ratio",
    "first use, ms",
  );
  for (const label of Object.keys(WORDS)) {
    const text = textOf(label);
    const size = utf8.encode(text).length;
    if (new TextDecoder(label).decode(encode(text, label)) !== text) throw new Error(`${label} loses text`);
    const speeds: number[][] = encoders.map(() => []);
    for (let round = -2; round < 2 * ROUNDS; round++) {
      for (const [index, encoder] of encoders.entries()) {
        const from = performance.now();
        for (let times = 0; times < 8; times++) encoder(text, label);
        // The first rounds let V8 compile.
        if (round >= 0) speeds[index]!.push(8 * size / 1000 / (performance.now() - from));
      }
    }
    const [own, ...others] = speeds;
    const compared = others.flatMap((other) => [Math.round(median(other)), medianRatio(own!, other)]);
    if (!iconv) compared.push("not reached", "");
    const first: number[] = [];
    for (let round = 0; round < ROUNDS; round++) {
      await using child = new Child("-A", import.meta.filename!, "--first", label);
      first.push(await child.number());
    }
    print(label, Math.round(median(own!)).toLocaleString("en").padStart(10), ...compared, median(first).toFixed(1));
  }
}

// ── Start ───────────────────────────────────────────────────────────────────────────────────────

async function measureStart(folder: string): Promise<void> {
  const theirs = `${folder}/theirs.ts`, own = `${folder}/own.ts`;
  await Deno.writeTextFile(
    theirs,
    `const onListen = ({ port }) => console.log(port);
const handler = () => new Response("${HELLO}");
Deno.serve({ port: 0, hostname: "127.0.0.1", onListen }, handler);`,
  );
  await Deno.writeTextFile(
    own,
    `import { serve } from "${new URL("../server.ts", import.meta.url)}";
const onListen = ({ port }) => console.log(port);
serve({ port: 0, body: "${HELLO}", onListen });`,
  );
  const commands: [name: string, args: string[]][] = [
    ["Deno.serve, 3 lines", [theirs]],
    ["charserve, 3 lines", [own]],
    ["server.ts --body", [new URL("../server.ts", import.meta.url).href, "--port=0", "--log=none", `--body=${HELLO}`]],
  ];
  const times: number[][] = commands.map(() => []);
  // The first round fills Deno's caches of compiled code.
  for (let round = -1; round < 9; round++) {
    for (const [index, [, args]] of commands.entries()) {
      const from = performance.now();
      await using child = new Child("--allow-net", ...args);
      using conn = await Deno.connect({ ...local, port: await child.number() });
      await converse(conn, utf8.encode("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), 1, () => true);
      if (round >= 0) times[index]!.push(performance.now() - from);
    }
  }
  print("\nSTART", "", "ms", "ratio");
  for (const [index, [name]] of commands.entries()) {
    print(
      index ? "" : "deno run to the first 200",
      name,
      median(times[index]!).toFixed(0),
      medianRatio(times[index]!, times[0]!),
    );
  }
}

// ── Which process is this? ──────────────────────────────────────────────────────────────────────

const [role, name = "", page = ""] = Deno.args;
if (role === "--serve") {
  console.log(await SERVERS[name]!(page));
  for await (const _ of Deno.stdin.readable) {
    const { user, system } = process.cpuUsage();
    console.log(user + system);
  }
  // Whoever measured it is gone.
  Deno.exit();
} else if (role === "--first") {
  const text = WORDS[name]!;
  const from = performance.now();
  encode(text, name);
  console.log(performance.now() - from);
} else {
  const folder = await Deno.makeTempDir();
  const clean = () => Deno.removeSync(folder, { recursive: true });
  Deno.addSignalListener("SIGINT", () => (clean(), Deno.exit(130)));
  try {
    const page = `${folder}/page.html`;
    const head = '<!doctype html><html lang="zh"><meta charset="utf-8"><title>你好</title><p>';
    await Deno.writeTextFile(
      page,
      head + "一二三四五六七八九十".repeat(99).slice(0, (1024 - utf8.encode(head).length) / 3),
    );
    console.log(`Deno ${Deno.version.deno}, ${Deno.build.target}, ${navigator.hardwareConcurrency} threads\n`);
    await measureRequests(page);
    await measureEncoders();
    await measureStart(folder);
  } finally {
    clean();
  }
  Deno.exit();
}
