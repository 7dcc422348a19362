/**
 * A client that forgives nothing: whatever a strict reader of RFC 9110 and RFC 9112 could complain of in an answer is
 * a {@linkcode Violation}. It shares no code with the server. The tests and the fuzzer use it.
 *
 * @module
 */

/** What must not happen did. */
export class Violation extends Error {
  override readonly name = "Violation";
}

/** Holds a condition to be true. */
export function insist(condition: unknown, message: string): asserts condition {
  if (!condition) throw new Violation(message);
}

/** What listens: a server of this process, or of another. */
export interface Listening {
  /** Its address. */
  readonly addr: Deno.Addr;
}

/** The head of an answer that was well-formed. Names of fields are in lower case; lines of one name are an error. */
export interface ReplyHead {
  readonly status: number;
  readonly fields: ReadonlyMap<string, string>;
}

/** An answer that was well-formed. */
export interface Reply extends ReplyHead {
  readonly content: Uint8Array<ArrayBuffer>;
}

/** Bytes of text, one a character. */
export const bytesOf = (text: string): Uint8Array<ArrayBuffer> =>
  Uint8Array.from(text, (character) => character.charCodeAt(0));

/** Text of bytes, one character each. */
export function latin1(bytes: Uint8Array): string {
  let text = "";
  for (let at = 0; at < bytes.length; at += 8192) {
    text += Reflect.apply(String.fromCharCode, undefined, bytes.subarray(at, at + 8192));
  }
  return text;
}

const DATE =
  /^(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d (?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) \d{4} \d\d:\d\d:\d\d GMT$/;

/** What RFC 9110 §15, RFC 6585 and RFC 7725 call the statuses. */
const REASONS: Readonly<Record<string, string>> = {
  100: "Continue",
  200: "OK",
  204: "No Content",
  206: "Partial Content",
  301: "Moved Permanently",
  304: "Not Modified",
  308: "Permanent Redirect",
  400: "Bad Request",
  401: "Unauthorized",
  403: "Forbidden",
  404: "Not Found",
  405: "Method Not Allowed",
  408: "Request Timeout",
  412: "Precondition Failed",
  413: "Content Too Large",
  414: "URI Too Long",
  415: "Unsupported Media Type",
  416: "Range Not Satisfiable",
  417: "Expectation Failed",
  421: "Misdirected Request",
  431: "Request Header Fields Too Large",
  500: "Internal Server Error",
  501: "Not Implemented",
  503: "Service Unavailable",
  505: "HTTP Version Not Supported",
};

/** Reads the lines of a head, without the empty one at its end. */
export function parseReplyHead(text: string): ReplyHead {
  const [statusLine = "", ...lines] = text.split("\r\n"), fields = new Map<string, string>();
  for (const line of [statusLine, ...lines]) {
    insist(/^[\t\x20-\x7e\x80-\xff]*$/.test(line), `a control character: ${line}`);
  }
  const [, status, reason = ""] = /^HTTP\/1\.1 ([1-5]\d\d) ((?:[A-Z][\x20-\x7e]*)?)$/.exec(statusLine) ?? [];
  insist(status !== undefined, `Cannot parse status line ${statusLine.slice(0, 99)}`);
  insist(reason === (REASONS[status] ?? reason), `9110 §15: ${status} is not "${reason}"`);
  for (const line of lines) {
    const [, name, value] = /^([\w!#$%&'*+.^`|~-]+): ((?:\S(?:.*\S)?)?)$/.exec(line) ?? [];
    insist(name !== undefined && value !== undefined, `Cannot parse field ${line}`);
    const key = name.toLowerCase(), known = fields.get(key);
    insist(known === undefined || key === "set-cookie", `the field ${name} came twice`);
    fields.set(key, known === undefined ? value : `${known}\n${value}`);
  }
  checkHead(Number(status), fields);
  return { status: Number(status), fields };
}

/** What a head must say, and must not (RFC 9110 and RFC 9112, by section). */
function checkHead(status: number, fields: ReadonlyMap<string, string>): void {
  const length = fields.get("content-length"), coding = fields.get("transfer-encoding");
  if (hasNoLength(status)) insist(length === undefined && coding === undefined, `9112 §6.2: a length with ${status}`);
  if (status < 200) return;
  const date = fields.get("date") ?? "", range = fields.get("content-range");
  insist(DATE.test(date) && new Date(date).toUTCString() === date, `9110 §6.6.1: Date ${date}`);
  insist(length === undefined || coding === undefined, "9112 §6.2: one of Content-Length and Transfer-Encoding");
  insist(length === undefined || /^(?:0|[1-9]\d*)$/.test(length), `9110 §8.6: Content-Length ${length}`);
  insist(coding === undefined || coding === "chunked", `9112 §6.1: Transfer-Encoding ${coding}`);
  insist(status !== 405 || fields.has("allow"), "9110 §15.5.6: 405 without Allow");
  insist(status !== 416 || /^bytes \*\/\d+$/.test(range ?? ""), `9110 §15.5.17: Content-Range ${range}`);
  const isPart = /^bytes \d+-\d+\/\d+$/.test(range ?? "") ||
    /^multipart\/byteranges; /.test(fields.get("content-type")!);
  insist(status !== 206 || isPart, "9110 §15.3.7: 206 of what?");
  insist(!/^30[12378]$/.test(`${status}`) || fields.has("location"), "9110 §15.4: no Location");
}

const hasNoLength = (status: number) => status < 200 || status === 204;

/** Whether an answer ends with its head (RFC 9112 §6.3). */
export const isBare = (method: string | undefined, status: number): boolean =>
  method === "HEAD" || hasNoLength(status) || status === 304;

/** The size of a chunk of an answer (RFC 9112 §7.1): without leading zeros, extensions, or spaces. */
export function parseChunkSize(line: string): number {
  insist(/^(?:0|[1-9A-Fa-f][\dA-Fa-f]{0,7})$/.test(line), `Cannot parse chunk size ${line.slice(0, 99)}`);
  return parseInt(line, 16);
}

/** One connection. Whoever waits in vain fails after its time, and does not hang. */
export class Client implements Disposable {
  readonly conn: Deno.Conn;
  readonly #guard: ReturnType<typeof setTimeout>;
  /** Come and not yet read. */
  #bytes = new Uint8Array();
  closed = false;

  constructor(conn: Deno.Conn, patience = 5000) {
    this.conn = conn;
    this.#guard = setTimeout(() => this[Symbol.dispose](), patience);
  }

  static async connect({ addr }: Listening): Promise<Client> {
    if (addr.transport === "unix") return new Client(await Deno.connect({ transport: "unix", path: addr.path }));
    const { hostname, port } = addr as Deno.NetAddr;
    const conn = await Deno.connect({ hostname, port });
    conn.setNoDelay(); // A byte written is a packet sent.
    return new Client(conn);
  }

  /** Sends all of it, in pieces of at most so many bytes. */
  async send(message: string | Uint8Array, pieceSize = Infinity): Promise<void> {
    const bytes = typeof message === "string" ? bytesOf(message) : message;
    for (let at = 0; at < bytes.length;) at += await this.conn.write(bytes.subarray(at, at + pieceSize));
  }

  /** The next answer; `method` is the request's, since HEAD decides whether content follows. */
  async receive(method = "GET"): Promise<Reply> {
    const lines: string[] = [];
    for (let line; (line = await this.#line()) !== "";) lines.push(line);
    const head = parseReplyHead(lines.join("\r\n"));
    return { ...head, content: isBare(method, head.status) ? new Uint8Array() : await this.#content(head.fields) };
  }

  async #content(fields: ReadonlyMap<string, string>): Promise<Uint8Array<ArrayBuffer>> {
    if (fields.has("transfer-encoding")) return await this.#chunks();
    const length = fields.get("content-length");
    if (length !== undefined) return await this.#take(Number(length));
    insist(fields.get("connection") === "close", "content without a length ends with the connection");
    while (await this.#fill());
    return this.#take(this.#bytes.length);
  }

  async #chunks(): Promise<Uint8Array<ArrayBuffer>> {
    const chunks: Uint8Array<ArrayBuffer>[] = [];
    for (let size = Infinity; size > 0;) {
      size = parseChunkSize(await this.#line());
      chunks.push(await this.#take(size));
      insist(await this.#line() === "", "a chunk does not end where it should");
    }
    return new Uint8Array(await new Blob(chunks).arrayBuffer());
  }

  /** The connection is at its end, and nothing was left to read. */
  async end(): Promise<void> {
    while (await this.#fill());
    insist(this.#bytes.length === 0, `bytes before the connection's end: ${latin1(this.#bytes)}`);
    insist(!this.closed, "the server did not close the connection");
  }

  async #line(): Promise<string> {
    let length;
    while ((length = this.#bytes.indexOf(0x0a)) < 0) {
      if (!await this.#fill()) throw new Error(`The connection ended in a line: "${latin1(this.#bytes)}"`);
    }
    const line = latin1(await this.#take(length + 1));
    insist(line.endsWith("\r\n"), `a line ends without CR: ${line}`);
    return line.slice(0, -2);
  }

  async #take(count: number): Promise<Uint8Array<ArrayBuffer>> {
    while (this.#bytes.length < count) {
      if (!await this.#fill()) throw new Error(`The connection ended ${count - this.#bytes.length} bytes early`);
    }
    const bytes = this.#bytes.slice(0, count);
    this.#bytes = this.#bytes.slice(count);
    return bytes;
  }

  async #fill(): Promise<boolean> {
    const piece = new Uint8Array(256 * 1024), count = await this.conn.read(piece);
    if (count === null) return false;
    const bytes = new Uint8Array(this.#bytes.length + count);
    bytes.set(this.#bytes);
    bytes.set(piece.subarray(0, count), this.#bytes.length);
    this.#bytes = bytes;
    return true;
  }

  [Symbol.dispose](): void {
    clearTimeout(this.#guard);
    if (!this.closed) this.conn.close();
    this.closed = true;
  }
}
