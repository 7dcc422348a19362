/**
 * charserve is a web server in one file. It listens on a socket, reads bytes, understands them as
 * HTTP/1.1 by hand, and answers with text in any charset of the Encoding Standard.
 *
 * HTTP is a conversation over one connection. The client sends a *request*: a line that names a
 * method and a target, *fields* that say more, an empty line, and perhaps *content*. The server
 * sends a *response* of the same form:
 *
 * ```text
 * GET /hello HTTP/1.1␍␊               HTTP/1.1 200 OK␍␊
 * Host: localhost:8000␍␊              Content-Type: text/plain;charset=gbk␍␊
 * ␍␊                                  Content-Length: 4␍␊
 *                                     ␍␊
 *                                     C4 E3 BA C3                 (你好 in GBK)
 * ```
 *
 * Reading this file downwards follows a request on its way:
 *
 * ```text
 * bytes → serveConnection → parseRequest → admit → locate (a route or a file)
 *       → represent: select (media type, charset, coding), then what is kept of that,
 *         or loadFile (read → decode → encode → code)
 *       → evaluatePreconditions → resolveRange → formatHead → Connection.write
 * ```
 *
 * Run it:
 *
 * ```sh
 * deno run --allow-net server.ts                                # the charset lab
 * deno run --allow-net server.ts --charset gbk --body '你好'     # one text, in GBK
 * deno run --allow-net --allow-read server.ts ./site            # a folder
 * ```
 *
 * Or call it:
 *
 * ```ts
 * import { serve } from "./server.ts";
 *
 * const server = serve({
 *   port: 8000,
 *   charset: "gbk",
 *   routes: [[/^\/hello\/(?<name>[^/]+)$/, ({ params }) => `<h1>你好，${params.name}</h1>`]],
 * });
 * await server.finished;
 * ```
 *
 * RFC 9110 is HTTP's meaning, RFC 9112 its form on the wire, RFC 9111 caching; "Encoding" is the
 * WHATWG Encoding Standard. Comments name the section that a line obeys.
 *
 * @module
 */

// ── Server ───────────────────────────────────────────────────────────────────────────────────────
// Accepts connections, serves each, enforces every timeout with one timer, and knows how to stop.

/**
 * Starts a server.
 *
 * ```ts
 * import { serve } from "./server.ts";
 * const server = serve({ routes: [[/^\/$/, () => "你好"]], charset: "gbk" });
 * await server.finished;
 * ```
 *
 * @throws {Deno.errors.AddrInUse} The port is taken.
 * @throws {Deno.errors.NotCapable} `--allow-net` is missing, or `--allow-read` for `root`.
 * @throws {Deno.errors.NotFound} `root` does not exist.
 * @throws {RangeError} A charset does not exist.
 * @throws {TypeError} A field cannot be sent, credentials are not `name:password`, or `cert` and `key` are not both given.
 */
export function serve(options: ServeOptions = {}): Server {
  return new HttpServer(options);
}

/** Options of {@linkcode serve}. What the command line takes is here under the same names. */
export interface ServeOptions {
  /** TCP port; 0 takes any free one. @default {8000} */
  port?: number;
  /** Address to listen on. @default {"127.0.0.1"} */
  host?: string;
  /** Path of a Unix socket to listen on instead of a TCP port. */
  unix?: string | undefined;
  /** Certificate chain in PEM (the text itself): serves HTTPS, together with `key`. */
  cert?: string | undefined;
  /** Private key of `cert` in PEM (the text itself). */
  key?: string | undefined;
  /** Share the port with other listeners that do the same (`SO_REUSEPORT`, needs `--unstable-net`). */
  reusePort?: boolean;
  /** Host names to answer to besides the address listened on; `*` is any. RFC 9110 §7.4. */
  allowHost?: readonly string[];
  /** Folder or file to serve. */
  root?: string | undefined;
  /** Answers every GET that no route takes with this text. */
  body?: string | undefined;
  /** Charset to send text in; without it files keep their own, and generated text is UTF-8. */
  charset?: string | undefined;
  /** Charset that files are stored in; `auto` looks into them. @default {"auto"} */
  sourceCharset?: string;
  /** What `Content-Type` claims instead of the true charset; `none` claims nothing. */
  declare?: string | undefined;
  /** What to write for a character that the charset lacks. @default {"auto"} */
  unmappable?: Unmappable | "auto";
  /** Fields sent with every response; they win over the server's own. */
  header?: readonly (readonly [name: string, value: string])[];
  /** Sends `Access-Control-Allow-Origin: *` and answers preflights. @default {false} */
  cors?: boolean;
  /** Asks for one of these, each `name:password`, as Basic authentication does (RFC 7617). */
  auth?: readonly string[];
  /** File of `root` that answers, with 200, what is not found (single-page applications). */
  fallback?: string | undefined;
  /** Never lists folders. @default {false} */
  noListing?: boolean;
  /** Serves names that begin with a dot. @default {false} */
  dotfiles?: boolean;
  /** Follows symbolic links that lead out of `root`, too. @default {false} */
  followLinks?: boolean;
  /** Media types by extension: `{ ".log": "text/plain" }`; they win over the server's own. */
  type?: Readonly<Record<string, string>>;
  /** Logs the client that `X-Forwarded-For` or `Forwarded` names. @default {false} */
  trustProxy?: boolean;
  /** Form of the log. @default {"none"} */
  log?: "common" | "combined" | "wire" | "none";
  /** Takes the log's text, whole lines at a time; without it standard error does. */
  onLog?: (lines: string) => void;
  /** Longest wait for a whole request head, in milliseconds. @default {10000} */
  headerTimeout?: number;
  /** How long a client may stay silent, in milliseconds. @default {60000} */
  idleTimeout?: number;
  /** Most connections at once; the next one gets 503. @default {1000} */
  maxConnections?: number;
  /** Longest content of a request, in bytes. @default {1048576} */
  maxBody?: number;
  /** Resources of a program's own, tried in order before all others. */
  routes?: readonly Route[];
  /** Stops the server, as `shutdown()` does, when it is aborted. */
  signal?: AbortSignal;
  /** Called with the address once connections are accepted. */
  onListen?: (address: Deno.Addr) => void;
  /** Told of what a handler throws, but for {@linkcode HttpError}; what it returns answers the request, else 500. */
  onError?: (error: unknown) => Content | void | Promise<Content | void>;
}

/** A running server, as {@linkcode Deno.serve} has one. */
export interface Server extends AsyncDisposable {
  /** Address that is listened on. */
  readonly addr: Deno.Addr;
  /** Resolves when the last connection is closed. */
  readonly finished: Promise<void>;
  /** How many requests are being answered. */
  readonly pending: number;
  /**
   * Stops accepting, lets answers under way finish (10 s at most), closes what is idle. Resolves when all is done.
   * @param grace For how long, in milliseconds, idle connections stay open: a request that comes on one is still
   * answered, with `Connection: close`, so that a proxy in front loses none. Without it they are closed at once.
   */
  shutdown(grace?: number): Promise<void>;
}

/** How long a shutdown waits for answers under way, in milliseconds. */
const DRAIN_TIME = 10_000;
/** After SIGTERM, how long idle connections stay open for a request that may be on its way, in milliseconds. */
const IDLE_GRACE = 1000;
/** How many times, and how long each, to wait for connections that the system has not handed over yet; in milliseconds. */
const BACKLOG_TURNS = 10, BACKLOG_TURN = 50;
/** How long to wait before accepting again when the process may open no more files, in milliseconds. */
const ACCEPT_BACKOFF = 100;

/** Lets scripts of other sites read answers, and their fields (Fetch §3.2.3). */
const CORS_FIELDS: readonly Field[] = [
  ["Access-Control-Allow-Origin", "*"],
  [
    "Access-Control-Expose-Headers",
    "Accept-Ranges, Content-Encoding, Content-Length, Content-Range, Date, ETag, Last-Modified, Location, Retry-After, *",
  ],
];

/** Errors that mean that a client disconnected before it was accepted. */
const DISCONNECT_ERRORS = [Deno.errors.NotConnected, Deno.errors.ConnectionAborted, Deno.errors.ConnectionReset];

class HttpServer implements Server {
  readonly addr: Deno.Addr;
  readonly finished: Promise<void>;
  readonly settings: Settings;
  readonly routes: readonly RouteResource[];
  readonly root: string | undefined;
  readonly secure: boolean;
  readonly log: Log;
  readonly options: ServeOptions;
  /** Fields added to every response; and those added where what the user says about caching would be wrong. */
  readonly added: AddedFields;
  readonly addedUncached: AddedFields;
  draining = false;
  readonly #listener: Deno.Listener;
  readonly #connections = new Set<Connection>();
  readonly #clock: Clock;
  readonly #queue = new ReadQueue();
  /** Value of the Date field. */
  readonly date = onceASecond(formatDate);
  /** Whether a request names this server (RFC 9110 §7.4): a page elsewhere must not reach us by a name that it controls. */
  readonly answersTo: (authority: string) => boolean;
  /** Resolved when the last connection is closed, at the end. */
  readonly #drained = Promise.withResolvers<void>();
  #drainDeadline = Infinity;
  #idleDeadline = Infinity;
  #stopping: Promise<void> | undefined;
  /** Of sweeps, in milliseconds. */
  readonly #interval: number;
  /** Closed TLS connections whose handshake is still pending: Deno keeps their sockets. */
  #handshaking = 0;
  /** Connections accepted so far. */
  #accepted = 0;
  /** ROOT as it was when it was last checked, when that was, and how long that stays fresh, in milliseconds. */
  #site: Site | undefined;
  #checkedAt = 0;
  #lifetime = 0;

  constructor(options: ServeOptions) {
    const settings = this.settings = settingsOf(options);
    this.options = options;
    this.root = settings.root;
    this.routes = [...(options.routes ?? []), ...(settings.body === undefined ? [] : [bodyRoute(settings.body)])]
      .map(routeResource);
    this.secure = settings.cert !== undefined;
    const added = [...(settings.cors ? CORS_FIELDS : []), ["X-Content-Type-Options", "nosniff"] as const];
    this.added = addedFields(added, settings.header);
    this.addedUncached = addedFields(
      added,
      settings.header.filter(([name]) => !/^(?:cache-control|expires)$/i.test(name)),
    );
    const { headerTimeout: head, idleTimeout: idle } = settings;
    const waits = { request: idle, head, content: idle, reader: idle, handler: Infinity, end: LINGER_TIME };
    this.#clock = { now: performance.now(), ...waits };
    this.log = new Log(settings.log, options.onLog);
    if (this.root !== undefined) checkFallback(this.site(), settings.fallback);
    this.#listener = listen(settings, options.reusePort);
    // Deno 2.6 leaves the transport of a TLS listener out.
    this.addr = settings.unix === undefined
      ? { ...this.#listener.addr as Deno.NetAddr, transport: "tcp" }
      : this.#listener.addr;
    this.answersTo = memoized(hostChecker(allowedHosts(this.addr, settings)));
    this.#interval = Math.max(10, Math.min(1000, Math.min(head, idle) / 4));
    this.#keepTime();
    this.finished = this.#accept().then(() => this.#end());
    options.signal?.addEventListener("abort", () => void this.shutdown(), { once: true });
    if (options.signal?.aborted) void this.shutdown();
    try {
      options.onListen?.(this.addr);
    } catch (error) {
      void this.shutdown();
      throw error;
    }
  }

  /** ROOT, resolved again if the last result is stale. Throws 503 if it does not exist. */
  site(): Site {
    const now = Date.now();
    if (this.#site === undefined || now - this.#checkedAt >= this.#lifetime || now < this.#checkedAt) {
      this.#checkRoot(now);
    }
    if (this.#site === undefined) {
      throw new HttpError(503, "The folder to serve does not exist", [["Retry-After", "1"]]);
    }
    return this.#site;
  }

  #checkRoot(now: number): void {
    const isFirst = this.#checkedAt === 0, last = this.#site;
    const path = isFirst ? Deno.realPathSync(this.root!) : ifPresent(() => Deno.realPathSync(this.root!));
    const info = path === undefined ? undefined : lstatOf(path);
    if (info === undefined && last !== undefined) this.log.notice(`ROOT no longer exists: ${this.root}`);
    const isSame = info !== undefined && last !== undefined && last.path === path && isSameFile(info, last.info);
    // Another folder under the same name is another site: everything that was kept is void.
    if (!isSame) {
      this.#site = info &&
        {
          server: this,
          path: path!,
          info,
          isFile: info.isFile,
          direct: { since: now, folders: new Set() },
          places: new Cache(CACHE_SIZE),
          hints: new Cache(HINTS_SIZE),
        };
    }
    const changes = [info, lstatOf(this.root!)].map((each) => each === undefined ? now : changeTime(each, now));
    this.#lifetime = freshnessLifetime(now - Math.max(...changes));
    this.#checkedAt = now;
  }

  async #accept(): Promise<void> {
    while (!this.draining) {
      try {
        this.#take(await this.#listener.accept());
      } catch (error) {
        if (this.draining) return;
        // The client hung up before it was accepted: that is nothing.
        if (DISCONNECT_ERRORS.some((each) => error instanceof each)) continue;
        // No more files may be opened: others will be closed.
        this.log.notice(`cannot accept a connection: ${(error as Error).message}`);
        await pause(ACCEPT_BACKOFF);
      }
    }
  }

  #take(conn: Deno.Conn): void {
    const number = ++this.#accepted;
    // Too many refused connections are still open: this one is closed without an answer.
    if (this.#connections.size >= 2 * this.settings.maxConnections) return conn.close();
    const connection = openConnection(conn, this.#clock, this.#queue, number);
    if (connection === undefined) return;
    const isFull = this.#connections.size + this.#handshaking >= this.settings.maxConnections;
    this.#connections.add(connection);
    this.#queue.connections++;
    const served = isFull ? refuseConnection(this, connection) : serveConnection(this, connection);
    const handshake = "handshake" in conn ? (conn as Deno.TlsConn).handshake() : undefined;
    handshake?.catch(() => {}); // The first read fails, too, and is handled.
    served.finally(() => {
      this.#connections.delete(connection);
      this.#queue.connections--;
      if (this.draining && this.#connections.size === 0) this.#drained.resolve();
      if (handshake === undefined) return;
      // Deno closes a TLS connection only when its handshake has ended, however: until then, it counts.
      const gone = () => this.#handshaking--;
      this.#handshaking++;
      handshake.then(gone, gone);
    });
  }

  get pending(): number {
    return [...this.#connections].filter(({ isIdle }) => !isIdle).length;
  }

  /** Sweeps now and then, until connections are drained. */
  #keepTime(): void {
    after(this.#interval, () => {
      if (this.draining) return;
      this.#sweep();
      this.#keepTime();
    });
  }

  /** Closes every connection whose deadline has passed. */
  #sweep(): void {
    const now = this.#clock.now = performance.now();
    if (now > this.#drainDeadline) return this.#cutOff();
    for (const connection of this.#connections) {
      if (now > connection.deadline) connection.expire();
      else if (now > this.#idleDeadline && connection.isIdle) connection[Symbol.dispose]();
    }
  }

  /** Closes the connections that do not finish in time. */
  #cutOff(): void {
    const { pending } = this;
    if (pending > 0) this.log.notice(`stopped with ${pending} ${pending === 1 ? "answer" : "answers"} unfinished`);
    for (const connection of this.#connections) connection[Symbol.dispose]();
    this.#drainDeadline = Infinity;
  }

  shutdown(grace: number = 0): Promise<void> {
    this.#stopping ??= this.#stop(grace);
    return this.finished;
  }

  async #stop(grace: number): Promise<void> {
    if (grace > 0) await this.#emptyBacklog();
    this.draining = true;
    this.#drainDeadline = performance.now() + DRAIN_TIME;
    this.#idleDeadline = performance.now() + grace;
    this.#listener.close();
    for (const connection of grace === 0 ? this.#connections : []) if (connection.isIdle) connection[Symbol.dispose]();
    if (this.#connections.size === 0) this.#drained.resolve();
  }

  /** Waits until no client has come for a moment: closing a listener resets connections that wait to be accepted. */
  async #emptyBacklog(): Promise<void> {
    for (let turn = 0, seen = -1; turn < BACKLOG_TURNS && seen !== this.#accepted; turn++) {
      seen = this.#accepted;
      await pause(BACKLOG_TURN);
    }
  }

  async #end(): Promise<void> {
    // While answers are under way, this alone may keep the process going.
    const sweeper = setInterval(() => this.#sweep(), this.#interval);
    await this.#drained.promise;
    clearInterval(sweeper);
    // The socket's file is gone with its listener; a new one may be another server's.
    await this.log.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.shutdown();
  }
}

/** The options, on top of the defaults. Labels become encodings' names; fields that would break a head are refused. */
function settingsOf(options: ServeOptions): Settings & { readonly root: string | undefined } {
  const given = Object.entries(options).filter(([, value]) => value !== undefined);
  const settings = { ...DEFAULTS, log: "none", root: undefined, ...Object.fromEntries(given) } as Settings & {
    root: string | undefined;
  };
  const { charset, sourceCharset, header, declare, auth, cert, key } = settings;
  for (const [name, value] of header) {
    checkField(name, value);
    if (FRAMING_FIELDS.has(name.toLowerCase())) throw new TypeError(`The field ${name} is the server's to write`);
  }
  if (declare !== undefined) checkField("Content-Type", contentType("text/html", undefined, declare));
  // An empty one, from a variable that is not set say, would let everybody in.
  if (!auth.every((each) => CREDENTIALS.test(each))) throw new TypeError("auth: expected name:password, neither empty");
  if ((cert === undefined) !== (key === undefined)) {
    throw new TypeError("cert and key are of no use without each other");
  }
  return {
    ...settings,
    charset: charset && encodingOf(charset),
    sourceCharset: sourceCharset === "auto" ? "auto" : encodingOf(sourceCharset),
  };
}

// Deno cannot close a TLS connection whose handshake never ends: towards the open Internet, put a proxy in front.
function listen({ host, port, unix, cert, key }: Settings, reusePort = false): Deno.Listener {
  if (unix !== undefined) return Deno.listen({ transport: "unix", path: unix });
  const address = { hostname: host, port, reusePort };
  if (cert !== undefined && key !== undefined) {
    return Deno.listenTls({ ...address, cert, key, alpnProtocols: ["http/1.1"] });
  }
  return Deno.listen(address);
}

/** Names to answer to; undefined is any. Other machines reach us by names that we cannot know. */
function allowedHosts(addr: Deno.Addr, { host, allowHost }: Settings): ReadonlySet<string> | undefined {
  const local = addr.transport === "tcp" && /^(?:127\.|::1$)/.test(addr.hostname);
  if (allowHost.includes("*") || !local && allowHost.length === 0) return undefined;
  const own = addr.transport === "tcp" ? [addr.hostname, `[${addr.hostname}]`, host.toLowerCase()] : [];
  return new Set([
    ...own,
    ...(local ? ["localhost", "127.0.0.1", "[::1]"] : []),
    ...allowHost.map((name) => name.toLowerCase()),
  ]);
}

function hostChecker(hosts: ReadonlySet<string> | undefined): (authority: string) => boolean {
  return (authority) => {
    // No browser leaves the name out; HTTP/1.0 may.
    if (hosts === undefined || authority === "") return true;
    const host = authority.replace(/:\d*$/, "").replace(/\.$/, "");
    return hosts.has(host) || host.endsWith(".localhost") && hosts.has("localhost");
  };
}

/** Throws if the fallback does not exist. */
function checkFallback(site: Site, fallback: string | undefined): void {
  if (fallback !== undefined) Deno.realPathSync(pathBelow(site, fallback));
}

function bodyRoute(body: string): Route {
  return [/^/, () => body];
}

/** Fields for every head: those of the user win. */
function addedFields(own: readonly Field[], users: readonly Field[]): AddedFields {
  const names = new Set(users.map(([name]) => name.toLowerCase()));
  const fields = [...own.filter(([name]) => !names.has(name.toLowerCase())), ...users];
  return { names, text: fields.map(([name, value]) => `${name}: ${value}\r\n`).join("") };
}

/** A connection; undefined if its client is gone already. */
function openConnection(conn: Deno.Conn, clock: Clock, queue: ReadQueue, number: number): Connection | undefined {
  try {
    return new Connection(conn, clock, queue, number);
  } catch {
    conn.close();
    return undefined;
  }
}

// ── Connection ───────────────────────────────────────────────────────────────────────────────────
// TCP delivers a stream of bytes, cut anywhere: a read may bring half a request or twenty. This is the
// only place that knows it. It owns one buffer, says what it is waiting for and until when, and
// leaves the clock to one sweep over all connections, so that no request pays for a timer.

/** Longest chunk-size line with its extensions, in bytes. */
const CHUNK_LINE_LIMIT = 1024;
/** First size of a connection's buffer, in bytes: holds any browser's head; ten thousand idle ones cost 40 MB. */
const BUFFER_SIZE = 4 * 1024;
/** Most that is read and thrown away, in bytes and milliseconds, so that a last answer is not lost to a reset (RFC 9112 §9.6). */
const LINGER_BYTES = 1024 * 1024, LINGER_TIME = 2000;
/** Most that is gathered for one write before it is sent, in bytes: a client that does not read must not make us hold more. */
const READY_LIMIT = 64 * 1024;

/** What a connection waits for: a request's first byte, its rest, its content, a handler, a client that reads, its end. */
type Waiting = "request" | "head" | "content" | "handler" | "reader" | "end";

/** The longest wait of each kind, in milliseconds, and the time of the last sweep. */
interface Clock extends Readonly<Record<Waiting, number>> {
  now: number;
}

/**
 * Whether a connection ends after the answer under way: no; yes; yes, though the client may still be sending; it is
 * closed already.
 */
type Ending = "no" | "close" | "linger" | "closed";

/** The client disconnected, or was cut off: nobody is left to be answered. */
class Disconnected extends Error {}
const disconnected = lazily(() => new Disconnected());

/** One connection, from its first byte to its last. */
async function serveConnection(server: HttpServer, connection: Connection): Promise<void> {
  using _ = connection;
  try {
    while (connection.ending === "no") {
      const exchange = nextExchange(server, connection);
      if (exchange === undefined) {
        if (await connection.receive()) continue;
        break;
      }
      const message = exchange.answer();
      // Answers that are ready leave together: one write for all the requests of one read.
      if (message instanceof Promise) await exchange.send(message);
      else if (connection.push(exchange.compose(message)) > READY_LIMIT) await connection.flush();
    }
    await connection.end();
  } catch (error) {
    if (!(error instanceof Disconnected)) server.log.notice(`connection broken off: ${errorText(error)}`);
  }
}

/** The next request, once all of its head is there. One that cannot be understood is answered, too. */
function nextExchange(server: HttpServer, connection: Connection): Exchange | undefined {
  try {
    const head = connection.takeHead();
    return head && new Exchange(server, connection, head);
  } catch (error) {
    return new Exchange(server, connection, connection.refusedHead(), error);
  }
}

/** Answers 503: there are too many connections. */
async function refuseConnection(server: HttpServer, connection: Connection): Promise<void> {
  using _ = connection;
  try {
    const full = new FramingError(503, "Too many connections", [["Retry-After", "1"]]);
    const exchange = new Exchange(server, connection, connection.refusedHead(), full);
    await exchange.send(exchange.answer());
    await connection.end();
  } catch {
    // The client did not wait.
  }
}

/** Connections that may wait for their next request at once before others have to wait for their turn. */
const READS_AT_ONCE = 64;
/** How long a connection that is given its turn may leave it unused before others go on, in milliseconds. */
const ROUND_TIME = 5;

/**
 * Who may read next, when many connections are busy. The runtime does only so many reads and writes before it looks
 * which sockets are ready, and then those that are served already come first: a few would go on, and all others wait.
 *
 * So of many connections, no more than `READS_AT_ONCE` may wait for their next request at a time; one that comes back
 * makes room for the next in the queue. Clients that have nothing to say would hold their place: a round ends after
 * `ROUND_TIME`, and then as many others may read.
 */
class ReadQueue {
  connections = 0;
  readonly #waiting: (() => void)[] = [];
  /** The first in `#waiting` that still waits. */
  #next = 0;
  /** How many of this round have not come back. */
  #outstanding = 0;
  #round = 1;
  #isTimed = false;

  /** Waits until a connection may read that last did so in `round`, 0 if never. Resolves with the round in which it may. */
  wait(round: number): number | Promise<number> {
    if (this.connections <= READS_AT_ONCE) return 0;
    if (round === this.#round) this.#outstanding--;
    if (this.#outstanding < READS_AT_ONCE && this.#waiting.length === this.#next) return this.#admit();
    const turn = new Promise<number>((resolve) => this.#waiting.push(() => resolve(this.#admit())));
    this.#goOn();
    return turn;
  }

  #admit(): number {
    this.#outstanding++;
    return this.#round;
  }

  #goOn(): void {
    while (this.#outstanding < READS_AT_ONCE && this.#next < this.#waiting.length) this.#waiting[this.#next++]!();
    if (this.#next === this.#waiting.length) this.#waiting.length = this.#next = 0;
    else if (!this.#isTimed) {
      this.#isTimed = true;
      after(ROUND_TIME, () => this.#startRound());
    }
  }

  #startRound(): void {
    this.#isTimed = false;
    this.#waiting.splice(0, this.#next);
    [this.#next, this.#outstanding] = [0, 0];
    this.#round++;
    this.#goOn();
  }
}

class Connection implements Disposable {
  /** When the wait is over, in milliseconds of the clock. */
  deadline = Infinity;
  ending: Ending = "no";
  /** Its number among all that were accepted, for the log. */
  readonly number: number;
  /** Address of the client, or `unix`. */
  readonly remote: string;
  #waiting: Waiting = "request";
  readonly #conn: Deno.Conn;
  readonly #clock: Clock;
  readonly #queue: ReadQueue;
  /** The round of the queue in which it last read. */
  #round = 0;
  /** Come and not yet consumed: `#bytes` from `#start` to `#end`. */
  #bytes = new Uint8Array(BUFFER_SIZE);
  #start = 0;
  #end = 0;
  /** Why no further request can be read. */
  #refusal: FramingError | undefined;
  /** Answers that wait to leave together, and their length in bytes. */
  #ready: Uint8Array[] = [];
  #readySize = 0;
  /** Fails the read or write that is under way. */
  #interrupt: (reason: Error) => void = () => {};
  /** Ends the wait for a handler. */
  #abandon: (reason: Error) => void = () => {};

  constructor(conn: Deno.Conn, clock: Clock, queue: ReadQueue, number: number) {
    // An answer in several writes must not wait for the client to acknowledge the first (RFC 896).
    if ("setNoDelay" in conn) (conn as Deno.TcpConn).setNoDelay();
    this.#conn = conn;
    this.#clock = clock;
    this.#queue = queue;
    this.number = number;
    this.remote = conn.remoteAddr.transport === "tcp" ? conn.remoteAddr.hostname : "unix";
  }

  /** The next head, if all of it has come. Throws `FramingError` if it cannot be understood. */
  takeHead(): RequestHead | undefined {
    if (this.#refusal !== undefined) throw this.#refusal;
    // Empty lines before a request are forgiven: old clients end content with one (RFC 9112 §2.2).
    while (this.#end - this.#start > 1 && this.#bytes[this.#start] === CR && this.#bytes[this.#start + 1] === LF) {
      this.#start += 2;
    }
    if (this.#start === this.#end) return undefined;
    const head = parseRequest(this.#bytes, this.#start, this.#end);
    if (head !== undefined) this.#start += head.text.length;
    return head;
  }

  /** A head that cannot be parsed: its text, and what an answer to it needs. */
  refusedHead(): RequestHead {
    const text = latin1(this.#bytes.subarray(this.#start, Math.min(this.#end, this.#start + HEAD_LIMIT)));
    const method = text.startsWith("HEAD ") ? "HEAD" : "GET";
    const nothing = { target: "", authority: "", path: "", query: undefined, framing: NO_CONTENT, fields: [0] };
    return { ...nothing, text, method, minor: 1, persistent: false };
  }

  /** Sends what is ready, then reads more of a head. Returns false if no further request can come. */
  async receive(): Promise<boolean> {
    if (this.#ready.length > 0) {
      // As `flush` does, without its promises: this is the way of nearly every answer.
      const bytes = this.#takeReady();
      this.setWaiting("reader");
      const sent = await this.#interruptible(this.#conn.write(bytes));
      if (sent < bytes.length) await this.write(bytes.subarray(sent));
    }
    const isIdle = this.#start === this.#end;
    this.setWaiting(isIdle ? "request" : "head");
    const turn = this.#queue.wait(this.#round);
    this.#round = typeof turn === "number" ? turn : await turn;
    const reading = this.#conn.read(this.#room());
    try {
      // A client that has not begun a request gets no 408: its connection is closed, and the read fails.
      const count = isIdle ? await reading : await this.#interruptible(reading);
      this.#end += count ?? 0;
      if (count !== null || isIdle) return count !== null && this.ending === "no";
      this.#refusal = new FramingError(400, "Cannot read request: the connection ended inside its head");
    } catch (error) {
      if (!(error instanceof FramingError)) throw disconnected();
      this.#refusal = error;
    }
    return true;
  }

  /** What has come and is not yet consumed. */
  get unread(): Uint8Array {
    return this.#bytes.subarray(this.#start, this.#end);
  }

  consume(count: number): void {
    this.#start += count;
  }

  /** The time of the last sweep, in milliseconds, on the clock that deadlines are on. */
  get sweptAt(): number {
    return this.#clock.now;
  }

  /** Reads more of a request's content, `since` plus the longest wait at most. Returns how many bytes came. */
  async receiveContent(since: number): Promise<number> {
    this.setWaiting("content");
    this.deadline = Math.min(this.deadline, since + this.#clock.content);
    const count = await this.#interruptible(this.#conn.read(this.#room()));
    if (count === null) throw disconnected();
    this.#end += count;
    this.setWaiting("handler");
    return count;
  }

  /** Where the next bytes go: behind those that wait, in a buffer that grows while a head needs it. */
  #room(): Uint8Array {
    if (this.#start === this.#end) {
      this.#start = this.#end = 0;
      return this.#bytes;
    }
    if (this.#end === this.#bytes.length) {
      const larger = this.#start > 0 ? this.#bytes : new Uint8Array(this.#bytes.length * 2);
      larger.set(this.unread);
      this.#bytes = larger;
      [this.#start, this.#end] = [0, this.#end - this.#start];
    }
    return this.#bytes.subarray(this.#end);
  }

  setWaiting(waiting: Waiting): void {
    // The deadline of a head stands from its first byte: a slow drip does not extend it.
    if (waiting === "head" && this.#waiting === "head") return;
    this.#waiting = waiting;
    this.deadline = this.#clock.now + this.#clock[waiting];
  }

  /** The same result, unless the sweep or the end of the connection come first. */
  #interruptible<T>(operation: Promise<T>): Promise<T> {
    return new Promise((resolve, reject) => {
      this.#interrupt = reject;
      operation.then(resolve, () => reject(disconnected()));
    });
  }

  /** What a handler gives, in its own time, unless the connection is closed before. */
  unlessClosed<T>(result: Promise<T>): Promise<T> {
    return new Promise((resolve, reject) => {
      this.#abandon = reject;
      if (this.ending === "closed") reject(disconnected());
      result.then(resolve, reject);
    });
  }

  /** Adds to what is ready. Returns how much that is, in bytes. */
  push(bytes: Uint8Array): number {
    this.#ready.push(bytes);
    return this.#readySize += bytes.length;
  }

  /** Writes all that is ready. */
  async flush(): Promise<void> {
    if (this.#ready.length > 0) await this.write(this.#takeReady());
  }

  #takeReady(): Uint8Array {
    this.#readySize = 0;
    return this.#ready.length === 1 ? this.#ready.pop()! : concat(this.#ready.splice(0));
  }

  /** Writes all of `bytes`: the system may take fewer at a time. */
  async write(bytes: Uint8Array): Promise<void> {
    for (let sent = 0; sent < bytes.length;) {
      this.setWaiting("reader");
      sent += await this.#interruptible(this.#conn.write(sent === 0 ? bytes : bytes.subarray(sent)));
    }
    this.setWaiting("handler");
  }

  /** No further request is read, whether or not the client expects that. */
  endAfterAnswer(ending: "close" | "linger"): void {
    if (this.ending !== "closed") this.ending = ending;
  }

  /** The sweep calls this when a wait is over. A client whose request is late gets 408; others are cut off. */
  expire(): void {
    const isLate = this.#waiting === "head" || this.#waiting === "content";
    if (!isLate || this.ending !== "no") return this[Symbol.dispose]();
    this.setWaiting("reader");
    this.#interrupt(new FramingError(408, "The request did not arrive in time"));
  }

  /** Whether no request is under way. */
  get isIdle(): boolean {
    return this.#waiting === "request";
  }

  /**
   * Sends what is ready. If the client may still be sending, says that nothing more will come, and reads on, within
   * limits: closing with unread bytes would reset the connection and could destroy the last answer.
   */
  async end(): Promise<void> {
    await this.flush();
    if (this.ending !== "linger") return;
    this.setWaiting("end");
    try {
      await this.#conn.closeWrite();
      for (let left = LINGER_BYTES; left > 0;) left -= await this.#conn.read(this.#bytes) ?? Infinity;
    } catch {
      // The client did not wait.
    }
  }

  /** Closes the socket; whatever still waits for it ends as `Disconnected`. */
  [Symbol.dispose](): void {
    if (this.ending === "closed") return;
    this.ending = "closed";
    this.deadline = Infinity;
    this.#conn.close();
    this.#interrupt(disconnected());
    this.#abandon(disconnected());
  }
}

/** Most content of requests that may be in memory at once, on all connections, in bytes. */
const CONTENT_BUDGET = 64 * 1024 * 1024;
/** Content of requests that is in memory now, in bytes. */
let contentInMemory = 0;

/** The content of one request, as it comes; exists only while a request has any. */
class RequestContent implements Disposable {
  readonly #connection: Connection;
  readonly #framing: Framing;
  /** Most that is taken, in bytes. */
  readonly #limit: number;
  /** What has not been read yet. */
  readonly #unread: AsyncGenerator<Uint8Array, void>;
  /** Whether the client waits to be told that it may send (RFC 9110 §10.1.1). */
  #awaitsContinue: boolean;
  /** When it was first waited for, and how much of it came since, in bytes. */
  #since: number | undefined;
  #received = 0;
  /** Its share of `contentInMemory`. */
  #reserved = 0;
  /** Whether nobody may read it any more: its memory would not be given back. */
  #isDisposed = false;

  constructor(connection: Connection, framing: Framing, limit: number, awaitsContinue: boolean) {
    this.#connection = connection;
    this.#framing = framing;
    this.#limit = limit;
    this.#awaitsContinue = awaitsContinue;
    this.#unread = this.#read();
  }

  /**
   * All of it.
   * @throws {HttpError} 413 if it is too long, 400 if it is malformed, 408 if it does not come, 503 if there is too
   * much of other requests.
   */
  async bytes(): Promise<Uint8Array<ArrayBuffer>> {
    try {
      return await this.#readAll();
    } catch (error) {
      // Nobody knows where the next request begins, even if the handler answers this one.
      this.#connection.endAfterAnswer("linger");
      throw error;
    }
  }

  async #readAll(): Promise<Uint8Array<ArrayBuffer>> {
    if (!this.#mayFit()) throw new HttpError(413, `The content exceeds ${this.#limit} bytes`);
    if (this.#awaitsContinue) {
      this.#awaitsContinue = false;
      // It goes behind the answers to earlier requests, which may not have left yet.
      this.#connection.push(CONTINUE);
      await this.#connection.flush();
    }
    // Memory is taken as content comes, not as it is announced.
    let content = new Uint8Array(this.#reserve(BUFFER_SIZE)), size = 0;
    for await (const piece of this.#unread) {
      const needed = size + piece.length;
      if (needed > this.#limit) throw new FramingError(413, `The content exceeds ${this.#limit} bytes`);
      if (needed > content.length) content = concat([content, new Uint8Array(this.#reserve(needed))]);
      content.set(piece, size);
      size = needed;
    }
    return content.subarray(0, size);
  }

  /** Whether the rest can be read past, so that another request can follow. */
  get canBeSkipped(): boolean {
    return !this.#awaitsContinue && this.#mayFit();
  }

  #mayFit(): boolean {
    return this.#framing.kind !== "length" || this.#framing.length <= this.#limit;
  }

  /** Reads past what the handler left. Returns whether that worked; the request has its answer in any case. */
  async skip(): Promise<boolean> {
    let size = 0;
    try {
      for await (const piece of this.#unread) {
        size += piece.length;
        if (size > this.#limit) return false;
      }
      return true;
    } catch {
      return false;
    }
  }

  /** Reserves memory for content in the shared budget. Throws 503 when that is used up. */
  #reserve(size: number): number {
    if (this.#isDisposed) throw disconnected();
    // However long one may be, there is room for one: its buffer grows to twice its length at most.
    if (contentInMemory + size > Math.max(CONTENT_BUDGET, 2 * this.#limit + BUFFER_SIZE)) {
      throw new FramingError(503, "Too much content of other requests is in memory", [["Retry-After", "1"]]);
    }
    contentInMemory += size;
    this.#reserved += size;
    return size;
  }

  [Symbol.dispose](): void {
    this.#isDisposed = true;
    contentInMemory -= this.#reserved;
    this.#reserved = 0;
  }

  /** Yields pieces, each valid until the next one is asked for (RFC 9112 §6.3; chunks: §7.1). */
  async *#read(): AsyncGenerator<Uint8Array, void> {
    if (this.#framing.kind === "length") yield* this.#readBytes(this.#framing.length);
    if (this.#framing.kind !== "chunked") return;
    for (let size; (size = parseChunkSize(await this.#readLine())) > 0;) {
      yield* this.#readBytes(size);
      if (await this.#readLine() !== "") {
        throw new FramingError(400, "Cannot read chunk: it is longer than its size");
      }
    }
    // Trailer fields are checked as fields are, and dropped (RFC 9110 §6.5.1 lets us).
    for (let line, size = 0; (line = await this.#readLine()) !== "";) {
      size += line.length;
      if (!FIELD_LINE.test(line) || size > HEAD_LIMIT) throw new FramingError(400, "Cannot parse trailer fields");
    }
  }

  async *#readBytes(count: number): AsyncGenerator<Uint8Array, void> {
    for (let left = count; left > 0;) {
      if (this.#connection.unread.length === 0) await this.#fill();
      const piece = this.#connection.unread.subarray(0, left);
      this.#connection.consume(piece.length);
      left -= piece.length;
      yield piece;
    }
  }

  /** A line of the chunked coding, without its CRLF. A bare CR or LF does not end one. */
  async #readLine(): Promise<string> {
    for (;;) {
      const { unread } = this.#connection, length = unread.indexOf(LF);
      if (length > CHUNK_LINE_LIMIT || (length < 0 && unread.length > CHUNK_LINE_LIMIT)) {
        throw new FramingError(400, `Cannot read chunk: a line exceeds ${CHUNK_LINE_LIMIT} bytes`);
      }
      if (length >= 0) {
        const line = latin1(unread.subarray(0, length));
        if (!line.endsWith("\r")) throw new FramingError(400, "Cannot read chunk: a line ends without CR");
        this.#connection.consume(length + 1);
        return line.slice(0, -1);
      }
      await this.#fill();
    }
  }

  /** Reads at least one more byte. A drip does not extend the deadline: on average, a kilobyte a second must come. */
  async #fill(): Promise<void> {
    this.#since ??= this.#connection.sweptAt;
    const earned = this.#received; // A byte earns a millisecond: that is a kilobyte a second.
    this.#received += await this.#connection.receiveContent(this.#since + earned);
  }
}

// ── Request ──────────────────────────────────────────────────────────────────────────────────────
// A pure function over bytes with three outcomes: it returns a head, returns undefined while the head
// is incomplete, or throws a `FramingError`. It is strict on purpose: whatever two parsers could read
// in two ways is refused, and the connection closed, since nobody can say where the next request
// begins (RFC 9112 §11.2, request smuggling).

/** Longest request head, in bytes: RFC 9112 §3 and RFC 9110 §5.4 leave the figures to the server. */
const HEAD_LIMIT = 16 * 1024;
/** Longest request-target, in bytes. */
const TARGET_LIMIT = 8 * 1024;
/** Most field lines of a head. */
const FIELD_COUNT_LIMIT = 100;

/** How the content is delimited (RFC 9112 §6.3). */
type Framing =
  | { readonly kind: "none" }
  | { readonly kind: "length"; readonly length: number }
  | { readonly kind: "chunked" };

const NO_CONTENT: Framing = { kind: "none" };

/** A parsed head. Strings are ISO-8859-1: a character a byte, nothing decoded yet. */
interface RequestHead {
  /** All of it, byte for byte. */
  readonly text: string;
  readonly method: string;
  readonly target: string;
  /** Host and port that the request is for, in lower case; empty if HTTP/1.0 names none. */
  readonly authority: string;
  /** Path of the target, still percent-encoded; `*` of `OPTIONS *`, empty for CONNECT. */
  readonly path: string;
  /** Query of the target without its `?`; undefined if there is none. */
  readonly query: string | undefined;
  /** The minor version: HTTP/1.0 or HTTP/1.1. */
  readonly minor: 0 | 1;
  readonly framing: Framing;
  /** Whether the client wants to keep the connection (RFC 9112 §9.3). */
  readonly persistent: boolean;
  readonly fields: FieldOffsets;
}

/**
 * Where the field lines stand in the head's text, four numbers each: the shape of the name, where it begins, and where the
 * value begins and ends. Before them stand the letters that names begin with, a bit each: most fields that are asked for
 * are absent. No text is made of a field that nobody asks for.
 */
type FieldOffsets = readonly number[];

/** A head, as far as its fields can be read. */
type HeadFields = Pick<RequestHead, "text" | "fields">;

const CR = 0x0d, LF = 0x0a, COLON = 0x3a, SP = 0x20, HTAB = 0x09;

/** RFC 9110 §5.6.2. */
const TOKEN_CHARACTERS = "!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/** What a byte may be part of: a token, a request line, a field value. */
const IN_TOKEN = 1, IN_LINE = 2, IN_VALUE = 4, IN_SPACE = 8;
const CLASSES = Uint8Array.from(
  { length: 256 },
  (_, byte) =>
    (TOKEN_CHARACTERS.includes(String.fromCharCode(byte)) ? IN_TOKEN : 0) |
    (byte >= SP && byte !== 0x7f ? IN_LINE | IN_VALUE : 0) |
    (byte === HTAB ? IN_VALUE : 0) |
    (byte === SP || byte === HTAB ? IN_SPACE : 0),
);

/** Stands for the end of a line that has not come yet. */
const INCOMPLETE = Infinity;

/**
 * Parses the head that begins at `start` (RFC 9112 §2.1); undefined if it is not complete at `end`. One pass over
 * the bytes checks each of them, and finds where the lines and their parts are.
 */
function parseRequest(bytes: Uint8Array, start: number, end: number): RequestHead | undefined {
  const lineEnd = skip(bytes, start, end, IN_LINE);
  if (lineEnd - start > TARGET_LIMIT + 64) {
    throw new FramingError(414, `Cannot parse request line: it exceeds ${TARGET_LIMIT} bytes`);
  }
  const fields = [0];
  let at = endLine(bytes, lineEnd, end);
  while (at < end && bytes[at] !== CR) {
    if (fields.length > 4 * FIELD_COUNT_LIMIT) {
      throw new FramingError(431, `Cannot parse head: it has more than ${FIELD_COUNT_LIMIT} fields`);
    }
    at = parseField(bytes, at, end, start, fields);
  }
  const headEnd = at < end ? endLine(bytes, at, end) : INCOMPLETE;
  if (Math.min(headEnd, end) - start > HEAD_LIMIT) {
    throw new FramingError(431, `Cannot parse head: it exceeds ${HEAD_LIMIT} bytes`);
  }
  return headEnd === INCOMPLETE
    ? undefined
    : interpret(latin1(bytes.subarray(start, headEnd)), lineEnd - start, fields);
}

/** Index of the first byte, from `at` on, that is not of the class. */
function skip(bytes: Uint8Array, at: number, end: number, byteClass: number): number {
  while (at < end && (CLASSES[bytes[at]!]! & byteClass) !== 0) at++;
  return at;
}

/** Where the next line begins, when this one ends at `at`: with CR and LF, both (RFC 9112 §2.2). */
function endLine(bytes: Uint8Array, at: number, end: number): number {
  if (at === end) return INCOMPLETE;
  if (bytes[at] === LF) throw new FramingError(400, "Cannot parse head: a line ends without CR");
  if (bytes[at] !== CR) throw new FramingError(400, "Cannot parse head: it has a control character");
  if (at + 1 === end) return INCOMPLETE;
  if (bytes[at + 1] !== LF) throw new FramingError(400, "Cannot parse head: a CR without LF");
  return at + 2;
}

/** Parses a field line (RFC 9112 §5), and notes where its parts are, counted from `start`. Returns where the next begins. */
function parseField(bytes: Uint8Array, at: number, end: number, start: number, fields: number[]): number {
  const nameEnd = skip(bytes, at, end, IN_TOKEN);
  if (nameEnd === end) return INCOMPLETE;
  // §5.1: no space before the colon. §5.2: a line that begins with a space (obs-fold) is refused too.
  if (bytes[nameEnd] !== COLON || nameEnd === at) {
    throw new FramingError(400, "Cannot parse field: expected a name, then a colon");
  }
  const valueStart = skip(bytes, nameEnd + 1, end, IN_SPACE), lineEnd = skip(bytes, valueStart, end, IN_VALUE);
  let valueEnd = lineEnd;
  while (valueEnd > valueStart && (CLASSES[bytes[valueEnd - 1]!]! & IN_SPACE) !== 0) valueEnd--;
  fields[0]! |= letterBit(bytes[at]!);
  fields.push(shapeOf(nameEnd - at, bytes[at]!), at - start, valueStart - start, valueEnd - start);
  return endLine(bytes, lineEnd, end);
}

/** The first letter of a name, in any case, as a bit. */
function letterBit(first: number): number {
  return 1 << (first & 31);
}

/** The length of a name and its first letter, in any case: few names share both. `fieldLines` takes the length out again. */
function shapeOf(length: number, first: number): number {
  return length << 5 | first & 31;
}

/** What the lines mean: version, target, host, framing, persistence. */
function interpret(text: string, lineEnd: number, fields: FieldOffsets): RequestHead {
  const methodEnd = text.indexOf(" "), targetEnd = lineEnd - " HTTP/1.1".length;
  const method = text.slice(0, methodEnd), target = text.slice(methodEnd + 1, targetEnd);
  const version = text.slice(targetEnd, lineEnd), minor = version === " HTTP/1.1" ? 1 : parseVersion(version);
  const isSound = methodEnd > 0 && target.length > 0 && (method === "GET" || TOKEN.test(method));
  if (minor === undefined || !isSound || target.includes(" ")) {
    throw new FramingError(400, `Cannot parse request line "${text.slice(0, Math.min(lineEnd, 200))}"`);
  }
  if (target.length > TARGET_LIMIT) throw new FramingError(414, `The target exceeds ${TARGET_LIMIT} bytes`);
  const head = { text, fields }, host = parseHost(fieldValue(head, "host"), minor);
  const { authority, path, query } = parseTarget(method, target, host), framing = parseFraming(head, minor);
  const persistent = isPersistent(fieldValue(head, "connection"), minor);
  return { text, method, target, authority, path, query, minor, framing, persistent, fields };
}

/** The minor version; undefined if this names none. Throws 505 for other major ones. */
function parseVersion(text: string): 0 | 1 | undefined {
  const { major, minor } = /^ HTTP\/(?<major>\d)\.(?<minor>\d)$/.exec(text)?.groups ?? {};
  if (major === undefined) return undefined;
  if (major !== "1") throw new FramingError(505, `HTTP/${major}.${minor} is not supported, HTTP/1.1 is`);
  return minor === "0" ? 0 : 1;
}

const connectionOptions = memoized((connection: string) => parseList(connection.toLowerCase()));

/** RFC 9112 §9.3: HTTP/1.1 goes on unless told otherwise, HTTP/1.0 only if asked to. */
function isPersistent(connection: string | undefined, minor: 0 | 1): boolean {
  if (connection === undefined) return minor === 1;
  const options = connectionOptions(connection);
  return !options.includes("close") && (minor === 1 || options.includes("keep-alive"));
}

/** The field's value, those of several lines joined (RFC 9110 §5.3); `name` in lower case. */
function fieldValue({ text, fields }: HeadFields, name: string): string | undefined {
  const first = name.charCodeAt(0), shape = shapeOf(name.length, first);
  if ((fields[0]! & letterBit(first)) === 0) return undefined;
  let value: string | undefined;
  for (let i = 1; i < fields.length; i += 4) {
    if (fields[i] !== shape || !isName(text, fields[i + 1]!, name)) continue;
    const line = text.slice(fields[i + 2]!, fields[i + 3]!);
    value = value === undefined ? line : `${value}, ${line}`;
  }
  return value;
}

/** Whether this name, in lower case, stands there in any case. */
function isName(text: string, at: number, name: string): boolean {
  for (let i = 0; i < name.length; i++) {
    const code = text.charCodeAt(at + i), isCapital = code >= 0x41 && code <= 0x5a;
    if ((isCapital ? code | 0x20 : code) !== name.charCodeAt(i)) return false;
  }
  return true;
}

/** Every field line of a head, in order. */
function fieldLines({ text, fields }: HeadFields): Field[] {
  return Array.from({ length: (fields.length - 1) / 4 }, (_, line) => {
    const [shape, nameStart, valueStart, valueEnd] = fields.slice(4 * line + 1, 4 * line + 5) as [
      number,
      number,
      number,
      number,
    ];
    return [text.slice(nameStart, nameStart + (shape >> 5)), text.slice(valueStart, valueEnd)] as const;
  });
}

/** RFC 3986 §3.2: a host that is not empty, with or without a port; or nothing at all. */
const AUTHORITY = /^(?:(?!\.*(?::|$))(?:[0-9A-Za-z\-._~!$&'()*+,;=%]+|\[[0-9A-Fa-f:.]+\])(?::(?<port>\d{0,5}))?)?$/;

/** An authority in lower case; undefined if this is none. Remembered, since the same few come again and again. */
const authorityOf = memoized((text: string): string | undefined => {
  const match = AUTHORITY.exec(text);
  return match !== null && Number(match[1] ?? 0) <= 65535 ? text.toLowerCase() : undefined;
});

/** RFC 9112 §3.2: exactly one Host in HTTP/1.1, and a sound one. */
function parseHost(host: string | undefined, minor: 0 | 1): string {
  if (host === undefined && minor === 0) return "";
  if (host === undefined) throw new FramingError(400, "Cannot parse head: it has no Host");
  // Two Host lines are joined by a comma and a space, which no authority has.
  const authority = authorityOf(host);
  if (authority === undefined) throw new FramingError(400, "Cannot parse Host: expected one host and port");
  return authority;
}

/** The four forms of a target (RFC 9112 §3.2): origin, absolute, authority, asterisk. */
function parseTarget(method: string, target: string, host: string): Pick<RequestHead, "authority" | "path" | "query"> {
  if (method === "OPTIONS" && target === "*") return { authority: host, path: "*", query: undefined };
  const before = target.startsWith("/") ? "" : method === "CONNECT" ? target : /^https?:\/\/[^/?#]+/i.exec(target)?.[0];
  const authority = before && authorityOf(before.replace(/^https?:\/\//i, ""));
  const isSound = before === "" ? method !== "CONNECT" : authority !== undefined;
  if (!isSound || target.includes("#")) throw new FramingError(400, `Cannot parse target "${target.slice(0, 200)}"`);
  const rest = before === "" ? target : target.slice(before!.length), mark = rest.indexOf("?");
  const path = mark < 0 ? rest : rest.slice(0, mark), query = mark < 0 ? undefined : rest.slice(mark + 1);
  return { authority: authority || host, path: path === "" && method !== "CONNECT" ? "/" : path, query };
}

/** Stricter than RFC 9112 §6.3: any doubt about the length is a 400. */
function parseFraming(head: HeadFields, minor: 0 | 1): Framing {
  const coding = fieldValue(head, "transfer-encoding"), length = fieldValue(head, "content-length");
  if (coding === undefined && length === undefined) return NO_CONTENT;
  if (coding === undefined) return parseLength(length!);
  if (length !== undefined) {
    throw new FramingError(400, "Cannot frame content: both Content-Length and Transfer-Encoding");
  }
  if (minor === 0) throw new FramingError(400, "Cannot frame content: Transfer-Encoding in HTTP/1.0");
  if (/^chunked$/i.test(coding)) return { kind: "chunked" };
  // Another coding below the chunks can be framed, but not understood (RFC 9112 §6.1).
  const codings = coding.toLowerCase().split(",").map(trimSpace), last = codings.pop();
  if (last === "chunked" && codings.every((name) => TOKEN.test(name) && !/^(?:chunked|identity)$/.test(name))) {
    throw new FramingError(501, `The transfer coding "${coding.slice(0, 100)}" is not implemented`);
  }
  throw new FramingError(400, `Cannot parse Transfer-Encoding "${coding.slice(0, 100)}"`);
}

/** A Content-Length. Two equal ones ("5, 5") are refused as two different ones are. */
function parseLength(text: string): Framing {
  // Fifteen digits stay below 2^53.
  const digits = /^\d+$/.test(text) ? text.replace(/^0+/, "") : undefined;
  if (digits === undefined || digits.length > 15) {
    throw new FramingError(400, `Cannot parse Content-Length "${text.slice(0, 100)}"`);
  }
  return digits === "" ? NO_CONTENT : { kind: "length", length: Number(digits) };
}

/** The size that a chunk's first line gives; extensions are ignored (RFC 9112 §7.1). */
function parseChunkSize(line: string): number {
  const { size } = /^0*(?<size>[0-9A-Fa-f]{1,8})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?$/.exec(line)?.groups ?? {};
  if (size === undefined) throw new FramingError(400, `Cannot parse chunk size "${line.slice(0, 40)}"`);
  return parseInt(size, 16);
}

// ── Exchange ─────────────────────────────────────────────────────────────────────────────────────
// One request and its answer: refuses what is not for us, finds what it is for, has it answered, sends that, and turns
// every error into a response.

/** A request as a handler sees it. Path, query, content and `request` are decoded when they are first used. */
export interface Incoming {
  /** Method, as it came. */
  readonly method: string;
  /** The request-target, as it came. */
  readonly target: string;
  /** The whole head as it came, in ISO-8859-1. */
  readonly headText: string;
  /** Path of the target, percent-decoded: as UTF-8, or in the charset in force if it is not UTF-8. */
  readonly path: string;
  /** Named groups of the route's pattern. */
  readonly params: Readonly<Record<string, string>>;
  /** Query, decoded as a form on a page in the charset in force would have encoded it. */
  readonly query: URLSearchParams;
  /** Host and port that the request is for, in lower case. */
  readonly authority: string;
  /** Address of the client, or `unix`. */
  readonly remote: string;
  /** Name of the charset in force: what the request selects, else what the server was told, else utf-8. */
  readonly charset: string;
  /** Head of the response as it goes, for a stream that shows it; undefined before. */
  readonly responseHead: string | undefined;
  /** The same as a web-standard `Request`, for code that expects one: `({ request }) => app.fetch(request)`. */
  readonly request: Request;
  /** Value of a field, those of several lines joined by commas; undefined if absent. */
  header(name: string): string | undefined;
  /**
   * Content of the request.
   * @throws {HttpError} 413 if it is longer than `maxBody`, 400 if it is malformed, 408 if it does not come.
   */
  bytes(): Promise<Uint8Array<ArrayBuffer>>;
  /** Content as text, in the charset that its Content-Type names; without one, detected as a file's is. */
  text(): Promise<string>;
  /**
   * Content as an urlencoded form, decoded as `query` is.
   * @throws {HttpError} 415 if it is something else.
   */
  form(): Promise<URLSearchParams>;
}

const NO_PARAMS: Readonly<Record<string, string>> = Object.freeze({});

class Exchange implements Incoming {
  params = NO_PARAMS;
  responseHead: string | undefined;
  readonly head: RequestHead;
  readonly server: HttpServer;
  readonly #connection: Connection;
  /** Why the request was refused before its head was interpreted. */
  readonly #refusal: unknown;
  readonly #content: RequestContent | undefined;
  #bytes: Promise<Uint8Array<ArrayBuffer>> | undefined;
  #path: string | undefined;
  #query: URLSearchParams | undefined;
  #request: Request | undefined;
  #selected: string | undefined | null = null;

  constructor(server: HttpServer, connection: Connection, head: RequestHead, refusal?: unknown) {
    this.server = server;
    this.#connection = connection;
    this.head = head;
    this.#refusal = refusal;
    this.#content = head.framing.kind === "none" ? undefined : this.#expectContent();
  }

  #expectContent(): RequestContent {
    const awaitsContinue = this.head.minor === 1 && this.header("expect") !== undefined;
    return new RequestContent(this.#connection, this.head.framing, this.server.settings.maxBody, awaitsContinue);
  }

  /** The answer: at once, if nothing has to be waited for. Whatever goes wrong becomes an answer, too. */
  answer(): WholeMessage | Promise<Message> {
    let message: Message | Promise<Message>;
    try {
      this.server.log.request(this.number, this.head.text);
      if (this.#refusal !== undefined) throw this.#refusal;
      message = admit(this) ?? represent(this, locate(this));
    } catch (error) {
      message = this.#explain(error);
    }
    if (message instanceof Promise) return message.catch((error) => this.#explain(error));
    return isWhole(message) && this.#content === undefined ? message : Promise.resolve(message);
  }

  /** Turns what was thrown into a response: a small page that says what went wrong, or what `onError` makes of it. */
  #explain(error: unknown): Message | Promise<Message> {
    const { log, options: { onError } } = this.server, isExpected = error instanceof HttpError;
    if (error instanceof Disconnected) throw error;
    if (error instanceof FramingError) this.#connection.endAfterAnswer("linger");
    if (!isExpected || error.cause !== undefined) {
      log.notice(`error: ${this.requestLine}: ${errorText(isExpected ? error.cause : error)}`);
    }
    return isExpected || onError === undefined ? errorResponse(this, error) : this.#askOnError(onError, error);
  }

  async #askOnError(onError: NonNullable<ServeOptions["onError"]>, error: unknown): Promise<Message> {
    try {
      const content = await onError(error);
      if (content) return await representContent(this, content);
    } catch (error) {
      this.server.log.notice(`error in onError: ${errorText(error)}`);
    }
    return errorResponse(this, error);
  }

  /** Writes a response that has to be waited for, behind those before it; reads past what is left of the content. */
  async send(answer: Message | Promise<Message>): Promise<void> {
    using _ = this.#content;
    const pending = Promise.resolve(answer);
    pending.catch(() => {}); // It may fail while what is before it is being written.
    this.#connection.setWaiting("handler");
    const message = await this.#inTurn(pending);
    try {
      await (isWhole(message) ? this.#connection.write(this.compose(message)) : this.#stream(message));
    } catch (error) {
      // A stream failed before its first byte: the error can still be told.
      const instead = await this.#connection.unlessClosed(Promise.resolve(this.#explain(error)));
      await this.#connection.write(this.compose(isWhole(instead) ? instead : errorResponse(this, error)));
    }
    if (this.#content !== undefined && this.#connection.ending === "no" && !await this.#content.skip()) {
      this.#connection.endAfterAnswer("linger");
    }
  }

  /** The message, once those before it have left. If its client is gone by then, whoever makes its content is told. */
  async #inTurn(pending: Promise<Message>): Promise<Message> {
    try {
      await this.#connection.flush();
      return await this.#connection.unlessClosed(pending);
    } catch (error) {
      if (error instanceof Disconnected) pending.then(cancelContent, () => {});
      throw error;
    }
  }

  /** Head and content in one piece, for one write. That of a kept response is reused until its Date changes. */
  compose(message: WholeMessage): Uint8Array {
    const goesOn = this.#decidePersistence(), { method, minor } = this.head;
    const { kept } = message, date = this.server.date();
    const kind = (goesOn ? 1 : 0) + minor * 2 + (method === "HEAD" ? 4 : 0);
    if (kept !== undefined && kept.date !== date) [kept.date, kept.composed] = [date, []];
    const bytes = kept?.composed[kind] ?? composeMessage(this.server, message, this.head, goesOn);
    if (kept !== undefined) kept.composed[kind] ??= ownBytes(bytes);
    this.server.log.response(this, message, bytes, message.content.length);
    return bytes;
  }

  /** Whether the connection goes on after this response (RFC 9112 §9.3); if not, it ends with it. */
  #decidePersistence(): boolean {
    const isAble = !this.server.draining && (this.#content?.canBeSkipped ?? true);
    if (isAble && this.head.persistent && this.#connection.ending === "no") return true;
    // A client that asked for the end sends nothing more, but perhaps the rest of its content.
    const isExpected = isAble && this.#content === undefined;
    if (this.#connection.ending === "no") this.#connection.endAfterAnswer(isExpected ? "close" : "linger");
    return false;
  }

  /** Writes a response whose content is made on the way. */
  async #stream(message: StreamMessage): Promise<void> {
    const { content, status } = message, { head, server } = this, connection = this.#connection;
    // HTTP/1.0 knows no chunks: there the end of the connection is the end.
    if (content.length === undefined && head.minor === 0) connection.endAfterAnswer("close");
    const text = this.responseHead = formatHead(server, message, head, this.#decidePersistence());
    let sent = 0;
    if (head.method !== "HEAD" && !hasNoContent(status)) sent = await this.#writeContent(latin1Bytes(text), content);
    else {
      cancelContent(message);
      await connection.write(latin1Bytes(text));
    }
    server.log.response(this, message, text, sent);
  }

  /** Writes a head, and content piece by piece. Returns how many bytes of content that was. */
  async #writeContent(head: Uint8Array, { read, isLive, length, chunkSize }: Stream): Promise<number> {
    const connection = this.#connection, isChunked = length === undefined && this.head.minor === 1;
    const pieces = read()[Symbol.asyncIterator]();
    // The head is sent with the first piece, if that comes soon: if making it fails, an error page can still be sent
    // instead.
    let before = head, sent = 0;
    const write = (bytes: Uint8Array) => {
      before = NO_BYTES;
      return connection.write(bytes);
    };
    try {
      const first = pieces.next();
      if (isLive && !await settlesSoon(first)) await write(head);
      let piece = await connection.unlessClosed(first);
      for (; !piece.done; piece = await connection.unlessClosed(pieces.next())) {
        const { value } = piece;
        sent += value.length;
        // What was announced is kept: one byte more would be taken for the next response.
        if (sent > (length ?? sent)) throw new Error(`its content is longer than ${length} bytes`);
        if (value.length > 0) await write(framePiece(before, value, isChunked ? chunkSize ?? value.length : undefined));
      }
      if (sent < (length ?? sent)) throw new Error(`its content is ${sent} bytes long, and not ${length}`);
      await write(isChunked ? concat([before, LAST_CHUNK]) : before);
      return sent;
    } catch (error) {
      if (before === head || error instanceof Disconnected) throw error;
      this.server.log.notice(`answer broken off: ${this.requestLine}: ${errorText(error)}`);
      throw disconnected();
    } finally {
      // One that is in the middle of a piece would only listen after that: it is not waited for.
      inBackground(() => pieces.return?.());
    }
  }

  /** Number of the connection. */
  get number(): number {
    return this.#connection.number;
  }

  /** Name that the client logged in with, for the log; `-` if none was asked for. */
  get user(): string {
    const { auth } = this.server.settings, credentials = auth.length === 0 ? undefined : credentialsOf(this);
    if (!isKnown(credentials, auth)) return "-";
    const name = credentials.split(":", 1)[0]!.replace(/[\s"\\]/g, "_");
    return escapeWire(latin1(UTF8_ENCODER.encode(name))) || "-";
  }

  /** The request line, safe to log. */
  get requestLine(): string {
    if (this.#refusal !== undefined) return "-";
    return escapeWire(this.headText.slice(0, this.headText.indexOf("\r\n")).replace(/["\\]/g, "\\$&"));
  }

  get method(): string {
    return this.head.method;
  }

  get target(): string {
    return this.head.target;
  }

  get headText(): string {
    return this.head.text;
  }

  /** Throws 400, as `charset` and `query` do, if the request asks for a charset that does not exist. */
  get path(): string {
    return this.#path ??= percentDecodeText(this.head.path, this.charset);
  }

  get query(): URLSearchParams {
    return this.#query ??= parseForm(this.head.query ?? "", this.charset);
  }

  get authority(): string {
    return this.head.authority;
  }

  /** The client's address; with `--trust-proxy`, the one that the proxy before us gives (RFC 7239 §5.2). */
  get remote(): string {
    const { remote } = this.#connection;
    if (!this.server.settings.trustProxy) return remote;
    // Only the last address was written by the proxy that we trust; those before it came from the client. Most proxies
    // write the older field, and let one that they do not know pass.
    const client = parseList(this.header("x-forwarded-for") ?? "").at(-1) ??
      this.header("forwarded")?.match(/^.*\bfor="?\[?([^\s;,"\]]+)/i)?.[1];
    return client !== undefined && /^[0-9A-Za-z.:_%-]{1,64}$/.test(client) ? client : remote;
  }

  get charset(): string {
    return this.selectedCharset ?? "utf-8";
  }

  /** Like `charset`, but undefined if neither request nor server select one. */
  get selectedCharset(): string | undefined {
    if (this.#selected === null) this.#selected = selectCharset(this.head, this.server.settings.charset);
    return this.#selected;
  }

  get request(): Request {
    return this.#request ??= this.#makeRequest();
  }

  header(name: string): string | undefined {
    return fieldValue(this.head, name.toLowerCase());
  }

  bytes(): Promise<Uint8Array<ArrayBuffer>> {
    if (this.#bytes === undefined) {
      this.#bytes = this.#content?.bytes() ?? Promise.resolve(new Uint8Array());
      this.#bytes.catch(() => {}); // A handler that does not wait for it leaves no rejection behind.
    }
    return this.#bytes;
  }

  async text(): Promise<string> {
    const bytes = await this.bytes(), field = this.header("content-type") ?? "text/plain";
    const label = /;[ \t]*charset="?([^\s";]+)/i.exec(field)?.[1]?.toLowerCase();
    if (label !== undefined && !LABELS.includes(label)) throw new HttpError(415, `The charset "${label}" is unknown`);
    const inForce = new Map([[this.charset, IN_FORCE_BITS]]);
    const encoding = label === undefined
      ? encodingOfBytes(bytes, essenceOf(field), inForce).encoding
      : sniffByteOrderMark(bytes) ?? encodingOf(label);
    return decodeText(bytes, encoding ?? this.charset);
  }

  async form(): Promise<URLSearchParams> {
    if (essenceOf(this.header("content-type") ?? "") !== "application/x-www-form-urlencoded") {
      throw new HttpError(415, "Expected a form (application/x-www-form-urlencoded)");
    }
    return parseForm(latin1(await this.bytes()), this.charset);
  }

  #makeRequest(): Request {
    const { method, authority, path, query } = this.head, scheme = this.server.secure ? "https" : "http";
    const url = `${scheme}://${authority || "localhost"}${path}${query === undefined ? "" : `?${query}`}`;
    if (!URL.canParse(url)) throw new HttpError(400, `Cannot parse Host "${authority}"`);
    const headers = new Headers(fieldLines(this.head).map(([name, value]) => [name, value]));
    const hasContent = this.#content !== undefined && method !== "GET" && method !== "HEAD";
    const body = hasContent ? ReadableStream.from(onDemand(() => this.bytes())) : null;
    return new Request(url, { method, headers, body });
  }
}

const EXPECTS_CONTINUE = /^100-continue$/i;

/** The answer to a preflight (Fetch §3.2.3); the last field is for pages of public sites (Private Network Access §3.2). */
const PREFLIGHT: Readonly<Record<string, string>> = {
  "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, PATCH, DELETE",
  "Access-Control-Allow-Headers": "*, Authorization",
  "Access-Control-Max-Age": "86400",
  "Access-Control-Allow-Private-Network": "true",
};

/** Refuses what is not for this server, or not for this client. Answers a preflight, which asks for no resource. */
function admit(exchange: Exchange): Message | Promise<Message> | undefined {
  const { server, method, head } = exchange, expectation = fieldValue(head, "expect"), { cors, auth } = server.settings;
  if (expectation !== undefined && !EXPECTS_CONTINUE.test(expectation)) {
    throw new HttpError(417, `The expectation "${expectation.slice(0, 100)}" cannot be met`);
  }
  if (!server.answersTo(head.authority)) {
    const host = escapeControls(exchange.authority.replace(/:\d*$/, "").slice(0, 100));
    throw new HttpError(421, `This server does not answer to that name: start it with --allow-host ${host} for that`);
  }
  if (cors && method === "OPTIONS" && exchange.header("access-control-request-method") !== undefined) {
    return representContent(exchange, { status: 204, headers: PREFLIGHT });
  }
  if (auth.length > 0) authenticate(credentialsOf(exchange), auth);
  return undefined;
}

/** Lets in whoever knows a name and its password. Throws 401. */
function authenticate(given: string | undefined, credentials: readonly string[]): void {
  if (isKnown(given, credentials)) return;
  const challenge: Field = ["WWW-Authenticate", 'Basic realm="charserve", charset="UTF-8"'];
  throw new HttpError(401, "A name and a password are required", [challenge]);
}

/** Whether this is one of them. Every one is compared, in a time that says nothing of how much of it was right. */
function isKnown(given: string | undefined, credentials: readonly string[]): given is string {
  return given !== undefined && credentials.map((known) => isEqual(known, given)).includes(true);
}

/** `name:password` of a request (RFC 7617 §2): base64 of UTF-8; undefined if there is none. */
function credentialsOf(exchange: Exchange): string | undefined {
  const token = /^basic +([A-Za-z0-9+/]+={0,2})$/i.exec(exchange.header("authorization") ?? "")?.[1];
  try {
    return token && UTF8_DECODER.decode(latin1Bytes(atob(token)));
  } catch {
    return undefined;
  }
}

/** Whether two texts are equal, without stopping at the first difference. */
function isEqual(known: string, given: string): boolean {
  let difference = known.length ^ given.length;
  for (let i = 0; i < known.length; i++) difference |= known.charCodeAt(i) ^ (given.charCodeAt(i) || 0);
  return difference === 0;
}

/** One thing, which is asked for when it is wanted. */
async function* onDemand<T>(make: () => Promise<T>): AsyncGenerator<T> {
  yield await make();
}

/** First that applies: `?charset=`, Accept-Charset (RFC 9110 §12.5.2), the server's; undefined if none. */
function selectCharset(head: RequestHead, configured: string | undefined): string | undefined {
  const asked = head.query?.includes("charset=") ? /(?:^|&)charset=([^&]+)/.exec(head.query)?.[1] : undefined;
  if (asked !== undefined) return readLabel(latin1(percentDecode(asked.replaceAll("+", " "))));
  const accepted = fieldValue(head, "accept-charset");
  return (accepted === undefined ? undefined : acceptedCharset(accepted, configured ?? "utf-8")) ?? configured;
}

/** Name of the encoding that a request names; throws 400. */
function readLabel(label: string): string {
  try {
    return encodingOf(label);
  } catch (error) {
    throw new HttpError(400, (error as Error).message);
  }
}

/** The charset of the highest quality; the preferred one, unless another is liked better; undefined if none is acceptable. */
function acceptedCharset(accept: string, preferred: string): string | undefined {
  const qualities = new Map<string, number>();
  for (const [label, quality] of parseAccept(accept)) {
    if (label === "*") qualities.set("*", quality);
    else if (LABELS.includes(label)) qualities.set(encodingOf(label), quality);
  }
  let best = preferred, most = qualities.get(preferred) ?? qualities.get("*") ?? 0;
  for (const [encoding, quality] of qualities) {
    if (encoding !== "*" && quality > most) [best, most] = [encoding, quality];
  }
  return most > 0 ? best : undefined;
}

/** Most fields of a form. */
const FORM_LIMIT = 1000;
const EQUALS = new TextEncoder().encode("=");

/**
 * An urlencoded form (URL §5.1), also from pages that are not in UTF-8: `_charset_` names their
 * charset, else what is not UTF-8 is in the charset in force. Browsers submit `&#N;` for characters
 * that the page's charset lacks: such a reference, and no other, is that character.
 */
function parseForm(encoded: string, charset: string): URLSearchParams {
  const parts = encoded.split("&").filter((pair) => pair !== "");
  if (parts.length > FORM_LIMIT) throw new HttpError(400, `A form has no more than ${FORM_LIMIT} fields here`);
  const pairs = parts.map((pair) => {
    const [name, ...value] = pair.split("=").map((part) => percentDecode(part.replaceAll("+", " ")));
    return [latin1(name!), concat(value.flatMap((part, i) => i === 0 ? [part] : [EQUALS, part]))] as const;
  });
  return decodeForm(pairs, charset);
}

/** The text of a form that is still bytes; names are one character a byte. */
function decodeForm(pairs: readonly (readonly [name: string, value: Uint8Array])[], charset: string): URLSearchParams {
  const named = pairs.find(([name]) => name === "_charset_")?.[1], label = named && latin1(named).toLowerCase();
  const isNamed = label !== undefined && LABELS.includes(label);
  // All of a form is in one charset.
  const all = pairs.flatMap(([name, value]) => [latin1Bytes(`${name}\n`), value, latin1Bytes("\n")]);
  const encoding = isNamed ? encodingOf(label) : utf8OrInForce(concat(all), charset);
  const readPart = (bytes: Uint8Array) => withoutReferences(decodeText(bytes, encoding), isNamed ? encoding : charset);
  return new URLSearchParams(pairs.map(([name, value]) => [readPart(latin1Bytes(name)), readPart(value)]));
}

/** Turns `&#N;` back into characters that the charset lacks. */
function withoutReferences(text: string, encoding: string): string {
  if (encoding.startsWith("utf") || !text.includes("&#")) return text;
  return text.replace(/&#(\d{2,7});/g, (reference, digits) => {
    const codePoint = Number(digits);
    if (codePoint > 0x10ffff) return reference;
    const character = String.fromCodePoint(codePoint);
    return encodeText(character, encoding, "html").lost > 0 ? character : reference;
  });
}

// ── Resource ─────────────────────────────────────────────────────────────────────────────────────
// A target names a resource: a route that a program adds, or a file below ROOT. Nothing outside ROOT has a name
// here, unless links may lead there. What a path leads to is kept, also that it leads to nothing, and checked again after a moment.

/** Answers the requests of a route. May throw {@linkcode HttpError}. */
export type Handler = (incoming: Incoming) => Content | Promise<Content>;

/**
 * A resource: the pattern of its decoded path, what answers, and the methods it takes (default: GET).
 * HEAD and OPTIONS need not be named.
 */
export type Route = readonly [pattern: RegExp, handler: Handler, methods?: readonly string[]];

/** What a target turned out to name. */
type Resource =
  | RouteResource
  | { readonly kind: "methods"; readonly allow: string }
  | { readonly kind: "file"; readonly file: FileFound; readonly status: 200 | 404 }
  | { readonly kind: "folder"; readonly path: string; readonly segments: readonly string[] }
  | { readonly kind: "redirect"; readonly location: string };

/** A route, and the text that its handler returned last, with the responses made of it. */
interface RouteResource {
  readonly kind: "route";
  readonly pattern: RegExp;
  readonly handler: Handler;
  readonly methods: readonly string[];
  /** Whether the pattern names parts of the path. */
  readonly hasParams: boolean;
  text?: string;
  variants: Map<string, WholeMessage>;
}

function routeResource([pattern, handler, methods = ["GET"]]: Route): RouteResource {
  const hasParams = pattern.source.includes("(?<");
  return { kind: "route", pattern, handler, methods, hasParams, variants: new Map() };
}

const KNOWN_METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "TRACE"];

/** Finds what a request names: the first route that fits, else a file. Throws 404, 405 or 501. */
function locate(exchange: Exchange): Resource {
  const { server, method } = exchange, isReading = method === "GET" || method === "HEAD";
  for (const route of server.routes) {
    const takesMethod = route.methods.includes(method) || method === "HEAD" && route.methods.includes("GET");
    if (!takesMethod || !isRoute(route, exchange)) continue;
    if (route.hasParams) exchange.params = Object.freeze({ ...route.pattern.exec(exchange.path)?.groups });
    return route;
  }
  if (isReading && server.root !== undefined && exchange.head.path !== "*") return locateFile(exchange);
  return answerOtherMethods(exchange);
}

function isRoute({ pattern }: RouteResource, exchange: Exchange): boolean {
  pattern.lastIndex = 0; // Should it be global or sticky, it starts anew.
  const isMatch = pattern.test(exchange.path);
  pattern.lastIndex = 0;
  return isMatch;
}

/** Which methods a path takes, for a request whose own is none of them. */
function answerOtherMethods(exchange: Exchange): Resource {
  const { server, method, head } = exchange, isAsterisk = head.path === "*";
  const routes = server.routes.filter((route) => isRoute(route, exchange));
  const allowed = new Set(routes.flatMap(({ methods }) => methods));
  if (server.root !== undefined && !isAsterisk) allowed.add("GET");
  if (allowed.has("GET")) allowed.add("HEAD");
  const allow = [...allowed, "OPTIONS"].join(", ");
  if (method === "OPTIONS" && (allowed.size > 0 || isAsterisk)) return { kind: "methods", allow };
  if (!KNOWN_METHODS.includes(method)) throw new HttpError(501, "This method is not implemented");
  if (allowed.size === 0 && method !== "CONNECT" && method !== "TRACE") throw new HttpError(404, "Nothing was found");
  throw new HttpError(405, "This method is not allowed here", [["Allow", allow]]);
}

/** ROOT as it is now: a folder, or a single file. Should its name be a link that is swapped, that is another site. */
interface Site {
  readonly server: HttpServer;
  /** No part of it is a symbolic link. */
  readonly path: string;
  readonly info: FileInfo;
  readonly isFile: boolean;
  /** Folders that were lately found to be reached without a link, and since when, in milliseconds. */
  readonly direct: { since: number; readonly folders: Set<string> };
  /** What paths lead to, by path, and by the charset that they were read in where that matters. */
  readonly places: Cache<Place>;
  /** What the files of folders are in, and since when that is known, in milliseconds. */
  readonly hints: Cache<{ readonly since: number; readonly found: Promise<ReadonlyMap<string, number>> }>;
}

/** What a path led to. */
interface Place {
  readonly resource: Resource | undefined;
  readonly evidence: Evidence;
}

/** The checks of the file system that something was decided by. */
interface Evidence {
  readonly site: Site;
  /** What the place is kept under in the site's places. */
  readonly key: string;
  readonly observations: Observation[];
  /** When every path itself was last looked at, and not its folder instead, in milliseconds. */
  since: number;
  /** When it was last found true, in either way, in milliseconds. */
  checkedAt: number;
  /** The latest change of all that was looked at, in milliseconds. */
  changed: number;
}

/** What was seen at a path. */
interface Observation {
  readonly path: string;
  readonly found: Found | undefined;
  /** If nothing was found, its folder, unless that just changed: a missing file cannot appear without changing it. */
  readonly folder: Deno.FileInfo | undefined;
}

/** What is there, and where: a path without symbolic links. */
interface Found {
  readonly real: string;
  readonly info: FileInfo;
}

/** Estimated size of a place without the responses that are kept with it, in bytes. */
const PLACE_SIZE = 4096;
/** Longest that a file is believed to be missing because its folder has not changed, in milliseconds. */
const LONGEST_ABSENCE = 10_000;
/** How long something is taken to be unchanged at most, in milliseconds. */
const LONGEST_LIFETIME = 1000;
/** Freshness lifetime, as a share of the time since the last change (RFC 9111 §4.2.2, heuristic freshness). */
const LIFETIME_SHARE = 0.01;
/** Time within which a second change may not show, in milliseconds: Deno gives the time of the last change in seconds. */
const GRANULARITY = 1050;

const SEPARATOR = Deno.build.os === "windows" ? "\\" : "/";

/** Finds the file, folder or redirection that a path names; else what stands in for it. Throws 404. */
function locateFile(exchange: Exchange): Resource {
  const { head: { path }, server } = exchange, { fallback } = server.settings;
  const key = isPlain(path) ? path : `${path} ${exchange.charset}`;
  const found = resourceAt(server, key, (evidence) => findPath(exchange, evidence));
  if (found !== undefined) return found;
  // The fallback stands in for pages only: it is of no use in the place of a script or an image.
  const isPage = typeOfExtension(percentDecodeText(path, "utf-8"), server.settings.type) === undefined;
  const page = fallback === undefined || !isPage ? undefined : ownFile(server, fallback, 200);
  const instead = page ?? ownFile(server, "404.html", 404);
  if (instead === undefined) throw new HttpError(404, "Nothing was found");
  return instead;
}

/** A file of ROOT that the server itself looks for. */
function ownFile(server: HttpServer, name: string, status: 200 | 404): Resource | undefined {
  return resourceAt(server, `\0${status} ${name}`, (evidence) => {
    const { site } = evidence, path = pathBelow(site, name), found = site.isFile ? undefined : observe(evidence, path);
    return found?.info.isFile ? fileResource(path, found, evidence, status) : undefined;
  });
}

/** What is kept under a key, if it is still true; else what is found now. */
function resourceAt(server: HttpServer, key: string, find: (evidence: Evidence) => Resource | undefined) {
  const site = server.site(), now = Date.now();
  let place = site.places.get(key);
  if (place === undefined || !isFresh(place.evidence, now) && !confirm(place.evidence, now)) {
    const evidence: Evidence = { site, key, observations: [], since: now, checkedAt: now, changed: 0 };
    place = { resource: find(evidence), evidence };
    site.places.set(copyOf(key), place, PLACE_SIZE);
  }
  return place.resource;
}

function isFresh({ checkedAt, changed }: Evidence, now: number): boolean {
  return now - checkedAt < freshnessLifetime(checkedAt - changed) && now >= checkedAt;
}

/** Makes again every check that something was decided by. */
function confirm(evidence: Evidence, now: number): boolean {
  const isOld = now - evidence.since >= LONGEST_ABSENCE;
  const isTrue = evidence.observations.every((each) =>
    each.folder !== undefined && !isOld && isSameState(lstatOf(parentOf(each.path)), each.folder) ||
    isUnchanged(evidence.site, each, now)
  );
  evidence.checkedAt = now;
  if (isOld) evidence.since = now;
  return isTrue;
}

/** Whether a path leads to what it led to, unchanged, or to nothing, as before. */
function isUnchanged(site: Site, { path, found }: Observation, now: number): boolean {
  // What was reached without a link is the same thing if its identity is, however it is reached now.
  if (found?.real === path) return isDirect(site, path, now) && isSameState(lstatOf(path), found.info);
  const again = findInside(site, path);
  return again === undefined || found === undefined
    ? again === found
    : again.real === found.real && isSameState(again.info, found.info);
}

/** Whether no folder on the way is a link by now: asked once for all that is in one, and again after a moment. */
function isDirect({ path: root, direct }: Site, path: string, now: number): boolean {
  if (path === root) return true;
  const folder = parentOf(path);
  if (now - direct.since >= LONGEST_LIFETIME || now < direct.since) {
    direct.since = now;
    direct.folders.clear();
  }
  if (!direct.folders.has(folder) && ifPresent(() => Deno.realPathSync(folder)) === folder) direct.folders.add(folder);
  return direct.folders.has(folder);
}

/** Whether two looks saw one file or folder in one state. */
function isSameState(a: FileInfo | undefined, b: FileInfo): boolean {
  return a !== undefined && isSameFile(a, b) && a.size === b.size && a.mtime?.getTime() === b.mtime?.getTime() &&
    a.ctime?.getTime() === b.ctime?.getTime();
}

/** Whether two looks saw one file or folder. An inode's number is used again, but hardly with its time of birth. */
function isSameFile(a: FileInfo, b: FileInfo): boolean {
  return a.ino === b.ino && a.dev === b.dev && a.birthtime?.getTime() === b.birthtime?.getTime();
}

/** When something last changed, in milliseconds. A time in the future says nothing. */
function changeTime({ mtime, ctime }: FileInfo, now: number): number {
  const times = [mtime?.getTime() ?? 0, ctime?.getTime() ?? 0];
  return Math.max(0, ...times.filter((time) => time <= now));
}

/** The folder that lacks a path; undefined if the folder itself is missing, or reached by a link. */
function folderWithout(path: string): Deno.FileInfo | undefined {
  const folder = parentOf(path), info = lstatOf(folder);
  const isThere = info !== undefined && ifPresent(() => Deno.realPathSync(folder)) === folder;
  return isThere && lstatOf(path) === undefined ? info : undefined;
}

/** How long something is taken to be unchanged that last changed so long ago; both in milliseconds. */
function freshnessLifetime(age: number): number {
  return Math.min(LONGEST_LIFETIME, Math.max(0, (age - GRANULARITY) * LIFETIME_SHARE));
}

/** Looks at a path, and notes what was there. */
function observe(evidence: Evidence, path: string): Found | undefined {
  const found = findInside(evidence.site, path);
  const folder = found === undefined ? folderWithout(path) : undefined, info = found?.info ?? folder;
  const changed = info === undefined ? evidence.checkedAt : changeTime(info, evidence.checkedAt);
  evidence.changed = Math.max(evidence.changed, changed);
  evidence.observations.push({ path, found, folder: evidence.checkedAt - changed > GRANULARITY ? folder : undefined });
  return found;
}

/** What a path leads to, if links do not lead it out of ROOT. */
function findInside(site: Site, path: string): Found | undefined {
  const real = ifPresent(() => Deno.realPathSync(path));
  if (real === undefined || !mayBeReached(site, real)) return undefined;
  // A link, or a short name on Windows, may stand for a name that is hidden. (But a volume of Kubernetes has its files in a
  // folder such as `..2026_11_28`, and links to them.)
  const names = namesBelow(site, real).filter((name) => !name.startsWith(".."));
  if (isHidden(site, names) && !isHidden(site, namesBelow(site, path))) return undefined;
  const info = lstatOf(real);
  return info && { real, info };
}

/** What is at a path. No link is followed. */
function lstatOf(path: string): Deno.FileInfo | undefined {
  return ifPresent(() => Deno.lstatSync(path));
}

/** Whether a path without links may be served: it is ROOT, or below it. */
function mayBeReached({ server, path }: Site, real: string): boolean {
  return server.settings.followLinks || real === path ||
    real.startsWith(path.endsWith(SEPARATOR) ? path : path + SEPARATOR);
}

/** The result of a call to the file system; undefined if nothing is there. Throws 403 or 503 if it cannot be had. */
function ifPresent<T>(attempt: () => T): T | undefined {
  try {
    return attempt();
  } catch (error) {
    return undefinedIfAbsent(error);
  }
}

/** Errors of the file system that say that nothing is there: also a name that is too long, and links in a circle. */
function undefinedIfAbsent(error: unknown): undefined {
  // Deno's own errors have the system's code, as those of `node:fs` have.
  const { code = "" } = error as { code?: string };
  if (["ENOENT", "ENOTDIR", "ENAMETOOLONG", "ELOOP"].includes(code)) return undefined;
  if (["EACCES", "EPERM"].includes(code) || error instanceof Deno.errors.NotCapable) {
    throw new HttpError(403, "The server is not permitted to read this", [], { cause: error });
  }
  if (["EMFILE", "ENFILE"].includes(code)) {
    throw new HttpError(503, "Too many files are open", [["Retry-After", "1"]]);
  }
  throw error;
}

const parentOf = (path: string) => path.slice(0, Math.max(1, path.lastIndexOf(SEPARATOR)));
const pathBelow = ({ path }: Pick<Site, "path">, ...names: string[]) =>
  [path === SEPARATOR ? "" : path, ...names].join(SEPARATOR) || path;
const nameOf = (path: string) => path.slice(path.lastIndexOf(SEPARATOR) + 1);

/** No file of ROOT has such a name: it climbs, is no name, or means a device on Windows. */
const IMPOSSIBLE_NAME = Deno.build.os === "windows"
  // deno-lint-ignore no-control-regex
  ? /[\x00-\x1f\/\\:*?"<>|]|[. ]$|^(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[\d¹²³]) *(?:\.|$)/i
  : /\0/;

/** Finds what a path names, in the first reading of it that names something. */
function findPath({ head, charset }: Exchange, evidence: Evidence): Resource | undefined {
  const { site } = evidence;
  for (const path of readingsOfPath(head.path, charset, site.server.settings)) {
    const found = site.isFile ? findRootFile(path, evidence) : findBelow(path, head.path, evidence);
    if (found !== undefined) return found;
  }
  return undefined;
}

/** Most charsets that a path is read in, besides those that are in force. */
const PATH_READINGS = 6;

/** What a path may read as: UTF-8, the charset in force, or the charsets in which an old link is the most ordinary text. */
function readingsOfPath(path: string, charset: string, { sourceCharset }: Settings): ReadonlySet<string> {
  const bytes = percentDecode(path);
  if (isPlain(path)) return new Set([path]);
  if (isValid(bytes, "utf-8")) return new Set([decodeText(bytes, "utf-8"), decodeText(bytes, charset)]);
  const detected = detect(bytes).slice(0, PATH_READINGS).map(({ encoding }) => encoding);
  const charsets = [charset, ...(sourceCharset === "auto" ? [] : [sourceCharset]), ...detected];
  return new Set(charsets.map((name) => decodeText(bytes, name)));
}

function findRootFile(path: string, evidence: Evidence): Resource | undefined {
  const { site } = evidence;
  const found = path === "/" || path === `/${nameOf(site.path)}` ? observe(evidence, site.path) : undefined;
  return found?.info.isFile ? fileResource(site.path, found, evidence) : undefined;
}

/** What a path below ROOT leads to; `encoded` is the path as it came. */
function findBelow(path: string, encoded: string, evidence: Evidence): Resource | undefined {
  const { site } = evidence, find = (path: string) => observe(evidence, path);
  const segments = removeDotSegments(path), isFolder = /(?:^|\/)\.{0,2}$/.test(path);
  if (segments.some((name) => IMPOSSIBLE_NAME.test(name)) || isHidden(site, segments)) return undefined;
  const target = pathBelow(site, ...segments), found = find(target);
  if (found?.info.isFile && !isFolder) return fileResource(target, found, evidence);
  if (!found?.info.isDirectory) {
    const page = found === undefined && !isFolder ? find(`${target}.html`) : undefined;
    return page?.info.isFile ? fileResource(`${target}.html`, page, evidence) : undefined;
  }
  // Relative, so that it stays on this host, and behind a prefix that a proxy takes away.
  if (!isFolder) return { kind: "redirect", location: `./${encodeURIComponent(lastSegment(path, encoded))}/` };
  const index = pathBelow(site, ...segments, "index.html"), foundIndex = find(index);
  if (foundIndex?.info.isFile) return fileResource(index, foundIndex, evidence);
  return { kind: "folder", path: found.real, segments };
}

/** The last segment of a path, in which an encoded slash separates nothing for the client (RFC 3986 §2.2). */
function lastSegment(path: string, encoded: string): string {
  const slashes = encoded.slice(encoded.lastIndexOf("/")).match(/%2f/gi)?.length ?? 0;
  return path.split("/").slice(-1 - slashes).join("/");
}

/** RFC 3986 §5.2.4: what `.` and `..` mean in a path, which never leaves ROOT. Empty segments mean nothing. */
function removeDotSegments(path: string): string[] {
  const segments: string[] = [];
  for (const segment of path.split("/")) {
    if (segment === "..") segments.pop();
    else if (segment !== "" && segment !== ".") segments.push(segment);
  }
  return segments;
}

/** Names that begin with a dot are not served, unless asked for; but see RFC 8615. */
function isHidden({ server }: Site, names: readonly string[]): boolean {
  return !server.settings.dotfiles &&
    names.some((name, i) => name.startsWith(".") && (i > 0 || name !== ".well-known"));
}

/** The names that lead from ROOT to a path without links; none if that is outside. */
function namesBelow({ path }: Site, real: string): string[] {
  const root = path.endsWith(SEPARATOR) ? path : path + SEPARATOR;
  return real.startsWith(root) ? real.slice(root.length).split(SEPARATOR) : [];
}

/** A regular file, and what was made of it. */
interface FileFound {
  /** Where it is: no part of it is a symbolic link. */
  readonly path: string;
  /** What it was asked for as: it decides the media type. */
  readonly name: string;
  readonly info: FileInfo;
  readonly size: number;
  /** Last modification, in milliseconds: not later than now (RFC 9110 §8.8.2.1). */
  readonly time: number;
  /** Until when another change could leave it with the same times, in milliseconds. */
  readonly settles: number;
  /** Whether that moment had passed when the file was last read, or does not matter. */
  isSettled: boolean;
  /** Identifies the file and its state. */
  readonly tag: string;
  /** Of its content, if that was read before it was settled: tells two states apart that have the same times. */
  digest?: string;
  /** What it was found by; the compressed one beside it is looked for later. */
  readonly evidence: Evidence;
  /** What it is, once its content was looked at. */
  nature?: Nature | undefined;
  /** Its bytes, while they are being read. */
  reading?: Promise<Opened> | undefined;
  /** Responses, by charset and coding; whoever comes while one is being made waits for it. */
  readonly variants: Map<string, WholeMessage | Promise<WholeMessage>>;
  /** Compressed files beside it. */
  readonly siblings: Map<Coding, FileFound | undefined>;
  /** Large text: where in what is sent each piece begins, by charset. */
  readonly conversions: Map<string, Conversion>;
}

/** As much of a file as decides what it is. */
type NamedFile = Pick<FileFound, "path" | "name" | "size">;

function fileResource(path: string, { real, info }: Found, evidence: Evidence, status: 200 | 404 = 200): Resource {
  return { kind: "file", file: newFile(real, nameOf(path), info, evidence), status };
}

/** Whether somebody set a file's time: then it is not that of its last change, which nobody can set. */
function isTimeSet({ mtime, ctime }: FileInfo): boolean {
  const second = (time: Date | null) => Math.trunc((time?.getTime() ?? 0) / 1000);
  return ctime !== null && second(mtime) !== second(ctime);
}

function newFile(path: string, name: string, info: FileInfo, evidence: Evidence): FileFound {
  const now = Date.now(), { size } = info, changed = changeTime(info, now);
  const settles = changed + (info.ctime === null ? RACY_TIME : GRANULARITY);
  // Writing a large file takes longer than a tick of the clock: its times tell states apart, unless they were set by hand.
  const isSettled = now >= settles || size > BUFFERED_LIMIT && !isTimeSet(info);
  const state = [info.ino, info.birthtime?.getTime(), info.mtime?.getTime(), info.ctime?.getTime(), size, info.dev];
  const tag = state.map((number) => (number ?? 0).toString(36)).join("-");
  const time = Math.min(info.mtime?.getTime() ?? 0, now);
  const made = { variants: new Map(), siblings: new Map(), conversions: new Map() };
  return { path, name, info, size, time, settles, isSettled, tag, evidence, ...made };
}

// ── Content ──────────────────────────────────────────────────────────────────────────────────────
// What handlers return becomes a message: text in the charset in force, bytes as they are, streams as they come.

/** What a handler may return. Text is sent in the charset in force; bytes are sent as they are. */
export type Content = string | Uint8Array<ArrayBuffer> | ReadableStream<Uint8Array> | Answer | Response;

/** A response, plainly. */
export interface Answer {
  /** Status code. @default {200} */
  readonly status?: number;
  /** More fields; `Content-Type` here counts as `type`. */
  readonly headers?: Readonly<Record<string, string>>;
  /** Media type. @default text/html for text that begins with "<", text/plain for other text, else application/octet-stream */
  readonly type?: string;
  /**
   * Text, bytes, or a stream of bytes. A stream that may be silent for long should send something now and then (a comment
   * in `text/event-stream`, say): only writing tells whether the client is still there.
   */
  readonly body?: string | Uint8Array<ArrayBuffer> | AsyncIterable<Uint8Array>;
  /** Charset for a text, instead of the one in force, or that bytes are in: any label. */
  readonly charset?: string;
  /** What `Content-Type` claims instead of that charset; `none` claims nothing. */
  readonly declare?: string;
  /** What to write for characters that the charset lacks. */
  readonly unmappable?: Unmappable | "auto";
  /** Sends bytes in chunks of this size (RFC 9112 §7.1), whatever characters they cut. */
  readonly chunkSize?: number;
}

/** Content that is made piece by piece: each piece is good until the next is asked for. */
interface Stream {
  /** In bytes, if it is known. */
  readonly length: number | undefined;
  /** Its pieces may be long in coming: the head does not wait for the first. */
  readonly isLive?: boolean;
  /** Size of the chunks that it is sent in, in bytes; without it, each piece is a chunk. */
  readonly chunkSize?: number;
  /** Called when it will not be read. */
  readonly cancel?: () => unknown;
  /** Yields the bytes of these ranges, one range after the other; without any, all. No piece is of two ranges. */
  readonly read: (ranges?: readonly ByteRange[]) => AsyncIterable<Uint8Array>;
}

/** Makes the response to a located request. */
function represent(exchange: Exchange, resource: Resource): Message | Promise<Message> {
  switch (resource.kind) {
    case "route": {
      const content = resource.handler(exchange);
      return content instanceof Promise
        ? content.then((content) => representHandled(exchange, resource, content))
        : representHandled(exchange, resource, content);
    }
    case "methods":
      return representContent(exchange, { status: 204, headers: { Allow: resource.allow } });
    case "redirect":
      return redirect(exchange, resource.location);
    case "folder":
      return representFolder(exchange, resource);
    case "file":
      return representFile(exchange, resource.file, resource.status);
  }
}

/** Longest text that is kept to be sent again, in UTF-16 code units. */
const REPEATABLE_LIMIT = 4 * 1024;

/** What a handler returned. The same text as the last time need not be encoded and composed again. */
function representHandled(exchange: Exchange, route: RouteResource, content: Content): Message | Promise<Message> {
  if (typeof content !== "string" || content.length > REPEATABLE_LIMIT) return representContent(exchange, content);
  if (content !== route.text) {
    route.text = content;
    route.variants = new Map();
  }
  // What `representText` depends on must be in the key. A short text is never compressed: a code unit takes eight bytes
  // at most (`&#20320;`), and an escape sequence three at the end.
  const isShort = content.length * 8 + 3 < COMPRESSION_LEAST, accepted = fieldValue(exchange.head, "accept-encoding");
  const coding = isShort ? undefined : ownCoding(acceptedCodings(accepted), content.length);
  const { variants } = route, key = isShort ? exchange.charset : `${exchange.charset} ${coding}`;
  const kept = variants.get(key);
  if (kept !== undefined) return kept;
  const keep = (message: Message) => {
    if (!isWhole(message)) return message;
    const keeping = { ...message, kept: { date: "", composed: [] } };
    variants.set(key, keeping);
    return keeping;
  };
  const message = representContent(exchange, content);
  return message instanceof Promise ? message.then(keep) : keep(message);
}

function redirect(exchange: Exchange, location: string): Message | Promise<Message> {
  const { query } = exchange.head, target = location + (query === undefined ? "" : `?${latin1ToUri(query)}`);
  const shown = escapeMarkup(target);
  return representContent(exchange, {
    status: 301,
    headers: { Location: target, "Cache-Control": "no-cache" },
    body: noticeHtml("301 Moved Permanently", `<p>It is at <a href="${shown}">${shown}</a>.</p>`, ""),
  });
}

/** Raw bytes of a query made fit for a Location field. */
function latin1ToUri(text: string): string {
  return text.replace(
    /[^!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~]/g,
    (byte) => "%" + byte.charCodeAt(0).toString(16).toUpperCase().padStart(2, "0"),
  );
}

/** Fields that are the server's own: framing is not left to handlers (RFC 9112 §6). */
const FRAMING_FIELDS: ReadonlySet<string> = new Set([
  "content-length",
  "transfer-encoding",
  "connection",
  "keep-alive",
  "upgrade",
  "date",
]);

/** The fields that a handler gives, without framing and Content-Type. Throws if one would break the head apart. */
function handlerFields(headers: Readonly<Record<string, string>>): Field[] {
  return Object.entries(headers).map(([name, value]) => checkField(name, value))
    .filter(([name]) => !FRAMING_FIELDS.has(name.toLowerCase()) && name.toLowerCase() !== "content-type");
}

/** What a handler returned, as a response. */
function representContent(exchange: Exchange, content: Content): Message | Promise<Message> {
  if (typeof content === "string") return representText(exchange, {}, defaultType(content), content, []);
  if (content instanceof Response) return representResponse(content);
  const isBody = content instanceof Uint8Array || content instanceof ReadableStream;
  const answer: Answer = isBody ? { body: content } : content;
  const { status = 200, headers = {} } = answer, fields = handlerFields(headers);
  checkStatus(status);
  // RFC 9110 §15.3.6: the form that was sent is to be emptied, and that is all.
  const body = status === 205 ? "" : answer.body ?? "";
  const named = Object.entries(headers).find(([name]) => name.toLowerCase() === "content-type")?.[1];
  const type = answer.type ?? (named && essenceOf(named)) ?? defaultType(body);
  if (typeof body === "string") return representText(exchange, answer, type, body, fields);
  const charset = answer.charset && encodingOf(answer.charset);
  const declare = answer.declare ?? exchange.server.settings.declare;
  fields.push(checkField("Content-Type", named ?? contentType(type, charset, declare)));
  if (!(body instanceof Uint8Array)) return { status, fields, charset, content: streamOf(body) };
  const { chunkSize } = answer;
  if (chunkSize === undefined) return { status, fields, charset, content: body };
  return { status, fields, charset, content: { length: undefined, chunkSize, read: () => inPieces(body, chunkSize) } };
}

function checkStatus(status: number): void {
  if (!Number.isInteger(status) || status < 200 || status > 599) throw new TypeError(`Cannot send status ${status}`);
}

function defaultType(body: Answer["body"]): string {
  if (typeof body !== "string") return "application/octet-stream";
  return /^\s*</.test(body) ? "text/html" : "text/plain";
}

/** A text, in the charset that the answer or the request selects. */
function representText(
  exchange: Exchange,
  answer: Answer,
  type: string,
  text: string,
  fields: Field[],
): Message | Promise<Message> {
  const { settings } = exchange.server, { status = 200 } = answer;
  if (text === "" && (status === 204 || status === 304)) return { status, fields, content: NO_BYTES };
  const rule = charsetRule(type), isNegotiable = rule === "any" && answer.charset === undefined;
  const charset = isNegotiable ? exchange.charset : rule === "any" ? encodingOf(answer.charset!) : "utf-8";
  const { bytes, lost } = encodeText(text, charset, unmappableFor(answer.unmappable ?? settings.unmappable, type));
  fields.push(checkField("Content-Type", contentType(type, charset, answer.declare ?? settings.declare)));
  const isCoded = fields.some(([name]) => name.toLowerCase() === "content-encoding");
  const isCompressible = bytes.length >= COMPRESSION_LEAST && rule !== "none" && !isCoded;
  if (isNegotiable) addVary(fields, "Accept-Charset");
  if (isCompressible) addVary(fields, "Accept-Encoding");
  const message: WholeMessage = { status, fields, content: bytes, charset, lost };
  const accepted = acceptedCodings(exchange.header("accept-encoding"));
  const coding = isCompressible ? ownCoding(accepted, bytes.length) : undefined;
  if (coding === undefined) return message;
  return compress(bytes.length, coding, () => bytes)
    .then((content) => ({ ...message, content, fields: [...fields, ["Content-Encoding", coding]] }));
}

/** Adds to the names of the fields that an answer depends on (RFC 9110 §12.5.5): one line, however many say so. */
function addVary(fields: Field[], name: string): void {
  const at = fields.findIndex(([other]) => other.toLowerCase() === "vary");
  if (at < 0) fields.push(["Vary", name]);
  else fields[at] = ["Vary", `${fields[at]![1]}, ${name}`];
}

/** The answer that says what went wrong, as a small page. */
function errorResponse({ server, head }: Exchange, error: unknown): WholeMessage {
  const isExpected = error instanceof HttpError;
  const { status, message, fields } = isExpected ? error : new HttpError(500, "The server failed to answer");
  // Not the charset that the request asks for: that may be what is wrong.
  const charset = server.settings.charset ?? "utf-8", title = `${status} ${REASONS[status] ?? "Error"}`;
  const said = escapeControls(message), sentence = /[.?!]$/.test(said) ? said : `${said}.`;
  return {
    status,
    fields: [
      ["Content-Type", contentType("text/html", charset, undefined)],
      ["Content-Security-Policy", PAGE_POLICY],
      ...fields,
    ],
    content: encodeText(noticeHtml(title, `<p>${escapeMarkup(sentence)}</p>`, head.path), charset, "html").bytes,
    charset,
    ...(error instanceof FramingError && { reason: message }),
  };
}

/** Most bytes of content that chunks are made of at once. */
const CHUNKED_AT_ONCE = 16 * 1024;

/** Bytes in pieces that chunks of one size fill. */
async function* inPieces(bytes: Uint8Array, size: number): AsyncGenerator<Uint8Array> {
  const step = Math.max(1, Math.trunc(CHUNKED_AT_ONCE / size)) * size;
  for (let at = 0; at < bytes.length; at += step) yield await Promise.resolve(bytes.subarray(at, at + step));
}

/** A stream that a handler gave: it may be endless, and is told when nobody wants it. */
function streamOf(body: AsyncIterable<Uint8Array>): Stream {
  const cancel = () => body instanceof ReadableStream ? body.cancel() : body[Symbol.asyncIterator]().return?.();
  return { length: undefined, isLive: true, read: () => body, cancel };
}

/**
 * A web-standard response: what it says of itself is kept. A body that is there as a whole gets a
 * Content-Length, one that is still being made is passed on as it comes.
 */
async function representResponse({ status, headers, body }: Response): Promise<Message> {
  checkStatus(status);
  const fields: Field[] = [];
  headers.forEach((value, name) => {
    if (!FRAMING_FIELDS.has(name)) fields.push(checkField(name, value));
  });
  if (body === null) return { status, fields, content: NO_BYTES };
  const reader = body.getReader(), ready: Uint8Array[] = [];
  let next = reader.read();
  // One piece, and then the end: it is there as a whole.
  while (ready.length < 2 && await settlesSoon(next)) {
    const { done, value } = await next;
    if (done) return { status, fields, content: ready[0] ?? NO_BYTES };
    ready.push(value);
    next = reader.read();
  }
  next.catch(() => {}); // Whoever reads on is told.
  const read = async function* () {
    try {
      yield* ready;
      for (let piece = await next; !piece.done; piece = await reader.read()) yield piece.value;
    } finally {
      await reader.cancel();
    }
  };
  return { status, fields, content: { length: undefined, isLive: true, read, cancel: () => reader.cancel() } };
}

/** Whether a promise takes no more than a few turns of the microtask queue. */
async function settlesSoon(promise: Promise<unknown>): Promise<boolean> {
  let settled = false;
  const settle = () => settled = true;
  promise.then(settle, settle);
  for (let turn = 0; turn < 4 && !settled; turn++) await null;
  return settled;
}

// ── Files ────────────────────────────────────────────────────────────────────────────────────────
// One file can be sent in many ways: in this charset or that, compressed or not. `select` picks one for a request
// and knows all about it (type, label, validators) before the bytes are made. Whatever HTTP says of the file (ETag,
// length, ranges) it says of these bytes, as sent. Small ones are kept, ready, with the place that they belong to.

/** Files up to this size are sent from memory, and compressed; larger ones stream. In bytes. */
const BUFFERED_LIMIT = 1024 * 1024;
/** A large file is read in pieces of this size, or of that if it is converted, in bytes. */
const PIECE_SIZE = 256 * 1024, CONVERTED_PIECE = 64 * 1024;
/** Smallest content worth compressing, in bytes. */
const COMPRESSION_LEAST = 1024;
/** What is kept of the charsets of folders, in bytes. */
const HINTS_SIZE = 1024 * 1024;
/** What is kept of a site, in bytes. */
const CACHE_SIZE = 64 * 1024 * 1024;
/** A file younger than this is not kept in memory, where times are exact, in milliseconds. */
const RACY_TIME = 50;

type Coding = "br" | "gzip";

/** What a file is, once its content was looked at. */
interface Nature {
  /** Media type. */
  readonly type: string;
  /** Which charsets that may be in. */
  readonly rule: CharsetRule;
  /** What its text is stored in; undefined if that is unknown, or it is no text: then it is never converted. */
  readonly encoding: string | undefined;
  /** Whether that is sure enough for a label: it was said, or detected by a clear margin. */
  readonly isSure: boolean;
  /** It is compressed, and its name says what is in it: `game.wasm.br`. */
  readonly coding?: Coding | undefined;
}

/** A file as it will be sent: in which charset and coding, and whose bytes. */
interface Variant {
  readonly file: FileFound;
  readonly nature: Nature;
  readonly encoding: string | undefined;
  /** The charset to declare: `encoding`, if that is sure enough. */
  readonly label: string | undefined;
  /** Whether a byte-order mark is put before it. */
  readonly hasMark: boolean;
  readonly coding: Coding | undefined;
  /** The file itself, or a compressed one beside it. */
  readonly source: FileFound;
}

/** The response to a request for a file: from memory, if it is kept. */
function representFile(exchange: Exchange, file: FileFound, status: 200 | 404): Message | Promise<Message> {
  if (file.nature === undefined) return loadFile(exchange, file, status);
  const variant = select(exchange, file, file.nature), kept = file.variants.get(keyOf(variant));
  return kept === undefined || kept instanceof Promise
    ? loadFile(exchange, file, status)
    : reply(exchange, kept, status);
}

const keyOf = ({ encoding, label, hasMark, coding }: Variant) =>
  `${encoding} ${label} ${coding}${hasMark ? " mark" : ""}`;

/** The response to a request for a file that has to be read, or waited for. */
async function loadFile(exchange: Exchange, found: FileFound, status: 200 | 404): Promise<Message> {
  const opened = await readShared(found), { file, bytes } = opened;
  const nature = file.nature ??= await natureOf(file.evidence.site, file, bytes);
  const selected = select(exchange, file, nature), { source, coding } = selected;
  const sent = source === file ? opened : await readShared(source).catch(() => undefined);
  if (sent === undefined) {
    // The compressed file is just being removed, or written: answer without it.
    file.siblings.set(coding!, undefined);
    return loadFile(exchange, file, status);
  }
  const variant = { ...selected, source: sent.file };
  const message = sent.file.size > BUFFERED_LIMIT
    ? streamedMessage(variant, sent.samples)
    : await sharedMessage(variant, sent.bytes);
  return reply(exchange, message, status);
}

/** A small file, as it will be sent: made once for all who ask meanwhile, and kept if it cannot change unnoticed. */
function sharedMessage(variant: Variant, bytes: Uint8Array<ArrayBuffer>): WholeMessage | Promise<WholeMessage> {
  const { file, source } = variant, key = keyOf(variant), isKept = file.isSettled && source.isSettled;
  const shared = file.variants.get(key);
  if (shared !== undefined) return shared;
  const making = wholeMessage(variant, bytes), forget = () => void file.variants.delete(key);
  file.variants.set(key, making);
  making.then((made) => isKept ? keep(file, key, made) : forget(), forget);
  return making;
}

function keep({ variants, evidence }: FileFound, key: string, message: WholeMessage): void {
  variants.set(key, message);
  // Head and content are kept in one piece, too.
  evidence.site.places.grow(evidence.key, 2 * message.content.length + PLACE_SIZE);
}

/** Which representation of a file answers a request (RFC 9110 §12.1, "proactive negotiation"). */
function select(exchange: Exchange, file: FileFound, nature: Nature): Variant {
  const { type, rule, encoding: stored, isSure, coding: own } = nature,
    wanted = rule === "any" ? exchange.selectedCharset : isSure ? "utf-8" : undefined;
  const encoding = stored === undefined ? undefined : wanted ?? stored;
  const label = isSure || wanted !== undefined ? encoding : undefined;
  const hasMark = encoding !== undefined && encoding.startsWith("utf-") && asksForMark(exchange);
  const variant = { file, nature, encoding, label, hasMark, source: file };
  if (own !== undefined) return { ...variant, encoding: stored, coding: own };
  const accepted = acceptedCodings(exchange.header("accept-encoding"));
  for (const coding of encoding === stored && !hasMark ? accepted : []) {
    const source = siblingOf(file, coding);
    if (source !== undefined) return { ...variant, coding, source };
  }
  const isWorthwhile = file.size >= COMPRESSION_LEAST && file.size <= BUFFERED_LIMIT &&
    (rule !== "none" || COMPRESSIBLE_TYPE.test(type));
  return { ...variant, coding: isWorthwhile ? ownCoding(accepted, file.size) : undefined };
}

/** `?bom=1`: a byte-order mark before text, for programs that look for nothing else. */
function asksForMark(exchange: Exchange): boolean {
  return exchange.head.query !== undefined && exchange.head.query.includes("bom=") && exchange.query.get("bom") === "1";
}

/** The best of the codings that we can make, if we are not too busy. */
function ownCoding(accepted: readonly Coding[], size: number): Coding | undefined {
  const coding = accepted.find((coding) => ownCodings().includes(coding));
  return coding !== undefined && canWait(size) ? coding : undefined;
}

/** The compressed file beside one, if it is not older. */
function siblingOf(file: FileFound, coding: Coding): FileFound | undefined {
  if (file.siblings.has(coding)) return file.siblings.get(coding);
  const path = file.path + (coding === "br" ? ".br" : ".gz"), { evidence } = file;
  const found = evidence.site.isFile ? undefined : observe(evidence, path);
  const isFresh = found?.info.isFile && (found.info.mtime?.getTime() ?? 0) >= (file.info.mtime?.getTime() ?? 0);
  const sibling = isFresh ? newFile(found.real, nameOf(path), found.info, evidence) : undefined;
  file.siblings.set(coding, sibling);
  return sibling;
}

const tagOf = ({ tag, digest }: FileFound) => digest === undefined ? tag : `${tag}.${digest}`;

/** Status, fields and validators of a response for a file. */
function variantHead(variant: Variant) {
  const { file, nature, encoding, label, hasMark, coding, source } = variant, { type, encoding: stored } = nature;
  const { settings } = file.evidence.site.server;
  const conversion = isAsStored(variant) ? "" : `-${stored}.${encoding}${hasMark ? "+" : "."}${settings.unmappable[0]}`;
  const etag = `"${tagOf(file)}${conversion}${coding ? `-${coding}` : ""}${
    source === file ? "" : `-${tagOf(source)}`
  }"`;
  const vary = [nature.rule === "any" && "Accept-Charset", nature.coding === undefined && "Accept-Encoding"];
  const fields: Field[] = [
    ["Content-Type", contentType(type, label, settings.declare)],
    ...(coding ? [["Content-Encoding", coding] as const] : []),
    ...(vary.some(Boolean) ? [["Vary", vary.filter(Boolean).join(", ")] as const] : []),
    ["Last-Modified", formatDate(file.time)],
    ["ETag", etag],
    ["Cache-Control", "no-cache"],
    ["Accept-Ranges", "bytes"],
  ];
  return { status: 200, fields, charset: label, validators: { etag, time: file.time } };
}

/** A small file, as it will be sent. */
async function wholeMessage(variant: Variant, bytes: Uint8Array<ArrayBuffer>): Promise<WholeMessage> {
  const { file, nature, source, coding } = variant;
  const described = variantHead(variant), kept = { date: "", composed: [] };
  if (source !== file) return { ...described, content: bytes, kept };
  const make = () => isAsStored(variant) ? { bytes, lost: 0 } : convert(variant, bytes);
  if (coding === undefined || coding === nature.coding) {
    const { bytes: content, lost } = make();
    return { ...described, content: ownBytes(content), lost, kept };
  }
  return { ...described, content: await compress(bytes.length, coding, () => make().bytes), kept };
}

/** Whether a file's bytes are sent as they are, but for their coding. */
function isAsStored({ nature, encoding, hasMark }: Variant): boolean {
  return encoding === nature.encoding && !hasMark;
}

/** Decodes, corrects the declaration inside, encodes. */
function convert(variant: Variant, bytes: Uint8Array): Encoded {
  const { nature: { type, encoding: stored }, encoding, hasMark } = variant;
  const text = rewriteDeclarations(decodeText(bytes, stored!), type, encoding!);
  return encodeText(hasMark ? `\ufeff${text}` : text, encoding!, errorModeOf(variant));
}

/** What becomes of characters that the charset lacks. */
function errorModeOf({ file, nature }: Variant): Unmappable {
  return unmappableFor(file.evidence.site.server.settings.unmappable, nature.type);
}

/** `auto` writes character references where they mean the character, and question marks elsewhere. */
function unmappableFor(mode: Unmappable | "auto", type: string): Unmappable {
  return mode !== "auto" ? mode : MARKUP_TYPE.test(type) ? "html" : "replacement";
}

/** The answer for what a request names, or for what is not found. */
function reply(exchange: Exchange, message: Message, status: 200 | 404): Message {
  if (status === 200) return applyConditions(exchange.head, message);
  const fields = message.fields.filter(([name]) => !/^(?:ETag|Last-Modified|Accept-Ranges)$/.test(name));
  const { validators: _, ...rest } = message;
  return { ...rest, status, fields, ...("kept" in rest && { kept: undefined }) } as Message;
}

/** What a file is: by its name, and by what is in it where the name does not say enough. */
async function natureOf(site: Site, file: NamedFile, sample: Uint8Array): Promise<Nature> {
  const { settings, log } = site.server;
  const { type: named, coding } = typeOfName(file.name, settings.type), type = typeOfContent(named, sample);
  const rule = charsetRule(type);
  if (coding !== undefined || rule === "none") return { type, rule, encoding: undefined, isSure: false, coding };
  const partial = file.size > sample.length, { sourceCharset } = settings;
  const said = evidentEncoding(sample, type, partial) ??
    (sourceCharset !== "auto" && isValid(sample, sourceCharset, partial) ? sourceCharset : undefined);
  if (said !== undefined) return { type, rule, encoding: said, isSure: true };
  const { encoding, isSure } = detectedEncoding(sample, await neighbourHints(site, parentOf(file.path)), partial);
  log.detection(file.path, encoding, isSure);
  return { type, rule, encoding, isSure };
}

/** Bits that speak for the charset that a file's neighbours are in. */
const NEIGHBOUR_BITS = 12;
/** How many neighbours are looked into, among how many entries, and how much of each, in bytes. */
const NEIGHBOURS = 12, NEIGHBOUR_ENTRIES = 500, NEIGHBOUR_SAMPLE = 16 * 1024;
/** How long that is believed, in milliseconds. */
const NEIGHBOURS_TIME = 10_000;

/** What the files of a folder, and ROOT's index, are in, as far as they say so or it is clear: a server knows the whole site. */
function neighbourHints(site: Site, folder: string): Promise<ReadonlyMap<string, number>> {
  const { hints } = site, known = hints.get(folder), now = Date.now();
  if (known !== undefined && now - known.since < NEIGHBOURS_TIME && now >= known.since) return known.found;
  const found = findHints(site, folder).catch((): ReadonlyMap<string, number> => new Map());
  hints.set(folder, { since: now, found }, PLACE_SIZE);
  return found;
}

async function findHints(site: Site, folder: string): Promise<ReadonlyMap<string, number>> {
  const paths = new Set(site.isFile ? [] : [pathBelow(site, "index.html")]);
  let entries = 0;
  for await (const { name, isFile } of site.isFile ? [] : Deno.readDir(folder)) {
    const type = typeOfExtension(name, site.server.settings.type);
    if (isFile && !name.startsWith(".") && type !== undefined && charsetRule(type) === "any") {
      paths.add(pathBelow({ path: folder }, name));
    }
    if (++entries >= NEIGHBOUR_ENTRIES || paths.size > NEIGHBOURS) break;
  }
  const votes = new Map<string, number>();
  for (const path of paths) {
    const encoding = await encodingOfNeighbour(site, path).catch(() => undefined);
    if (encoding !== undefined && encoding !== "utf-8") votes.set(encoding, (votes.get(encoding) ?? 0) + 1);
  }
  const most = Math.max(...votes.values());
  return new Map([...votes].map(([encoding, count]) => [encoding, NEIGHBOUR_BITS * count / most]));
}

/** What a file is in, if it says so, or if that is clear from its beginning. */
async function encodingOfNeighbour(site: Site, path: string): Promise<string | undefined> {
  using file = await openFile(site, path);
  const buffer = new Uint8Array(NEIGHBOUR_SAMPLE), length = file.read(buffer, 0);
  const sample = buffer.subarray(0, length), partial = length === buffer.length;
  const type = typeOfExtension(path, site.server.settings.type) ?? "text/plain";
  const { encoding, isSure } = encodingOfBytes(sample, type, new Map(), partial);
  return !isSure ? undefined : encoding === "gb18030" ? "gbk" : encoding;
}

/** A file's bytes, or the beginning of a large one; whoever needs them at the same time shares them. */
function readShared(file: FileFound): Promise<Opened> {
  return file.reading ??= readFile(file).finally(() => file.reading = undefined);
}

/** A file as it was when it was opened, and its bytes, or the beginning of a large one. */
interface Opened {
  readonly file: FileFound;
  readonly bytes: Uint8Array<ArrayBuffer>;
  /** What tells later whether it has only grown: hardly ever does it keep both ends when it is written anew. */
  readonly samples: readonly Sample[];
}

/** How often a file that is being written over is read anew, and how long is waited between, in milliseconds. */
const READ_ATTEMPTS = 5, READ_PAUSE = 5;
/** How much of a large file tells whether it has only grown, at each end, in bytes. */
const GROWTH_SAMPLE = 4096;

async function readFile(found: FileFound): Promise<Opened> {
  for (let attempt = 0; attempt < READ_ATTEMPTS; attempt++) {
    if (attempt > 0) await pause(READ_PAUSE);
    const now = Date.now();
    using opened = await openFile(found.evidence.site, found.path);
    const info = opened.stat();
    const file = isSameState(info, found.info) ? found : newFile(found.path, found.name, info, found.evidence);
    const bytes = new Uint8Array(Math.min(file.size, BUFFERED_LIMIT)), length = opened.read(bytes, 0);
    const samples = file.size === bytes.length
      ? [{ position: 0, bytes }]
      : [0, file.size - GROWTH_SAMPLE].map((position) => readSample(opened, position, GROWTH_SAMPLE));
    if (length < bytes.length || !await keepsItsBytes(opened, info, file.path, samples)) continue;
    if (!file.isSettled) await tagByDigest(file, opened, bytes, now);
    return { file, bytes, samples };
  }
  throw fileChanged();
}

/** Largest file that is read to its end for its digest, in bytes. */
const DIGEST_LIMIT = 64 * 1024 * 1024;

/** Adds a digest to the tag of a file that changed lately: its times may not show the next change. */
async function tagByDigest(file: FileFound, opened: OpenFile, bytes: Uint8Array<ArrayBuffer>, now: number) {
  // A file too large for that gets a tag that never matches, until it has settled.
  const digest = file.size > DIGEST_LIMIT ? crypto.randomUUID() : await digestOf(opened, bytes, file.size);
  file.isSettled = now >= file.settles;
  if (digest === file.digest) return;
  file.digest = digest;
  file.nature = undefined;
  for (const made of [file.variants, file.siblings, file.conversions]) made.clear();
}

/** A digest of a file as long as it was, of which some was read. */
async function digestOf(opened: OpenFile, bytes: Uint8Array<ArrayBuffer>, size: number): Promise<string> {
  let digest = await digestOfBytes(bytes);
  for (let at = bytes.length; at < size; at += PIECE_SIZE) {
    const piece = new Uint8Array(Math.min(size - at, PIECE_SIZE));
    opened.read(piece, at);
    digest = await digestOfBytes(concat([latin1Bytes(digest), piece]));
  }
  return digest;
}

/** Some of a file, as it was read. */
interface Sample {
  readonly position: number;
  readonly bytes: Uint8Array;
}

/** Whether a file is as it was when it was opened, or lost its name, or has only grown: then it still has the samples. */
async function keepsItsBytes(
  file: OpenFile,
  opened: FileInfo,
  path: string,
  samples: readonly Sample[],
): Promise<boolean> {
  for (let attempt = 0; attempt < READ_ATTEMPTS; attempt++) {
    // What is being appended shows in the time first, and then in the size.
    if (attempt > 0) await pause(READ_PAUSE);
    const info = file.stat();
    if (isSameState(info, opened)) return true;
    if (info.size > opened.size) return samples.every((sample) => hasSample(file, sample));
    if (info.size < opened.size) return false;
    // What is removed, or has another in its place, changes its state, but no byte.
    const there = lstatOf(path);
    const isGone = there === undefined || !isSameFile(there, info) || info.nlink !== opened.nlink;
    if (isGone && isSameState({ ...info, ctime: opened.ctime }, opened)) return true;
  }
  return false;
}

function hasSample(file: OpenFile, { position, bytes }: Sample): boolean {
  const again = readSample(file, position, bytes.length).bytes;
  return again.length === bytes.length && again.every((byte, i) => byte === bytes[i]);
}

function readSample(file: OpenFile, position: number, length: number): Sample {
  const buffer = new Uint8Array(length);
  return { position, bytes: buffer.subarray(0, file.read(buffer, position)) };
}

/** For a file that is no longer what was promised. */
const fileChanged = () => new HttpError(503, "The file is being written", [["Retry-After", "1"]]);

/** Opens a file of the site: what is opened was reached without a link, however fast somebody swaps folders and links. */
async function openFile({ server: { settings } }: Site, path: string): Promise<OpenFile> {
  for (let attempt = 0; attempt < READ_ATTEMPTS; attempt++) {
    const file = await openInTime(path), info = file?.stat();
    if (file === undefined || info === undefined) break;
    if (info.isFile && (settings.followLinks || isReachedDirectly(path, (found) => isSameFile(found, info)))) {
      return file;
    }
    // Another may have taken its place meanwhile, as it should be.
    file[Symbol.dispose]();
  }
  if (lstatOf(path)?.isFile) throw fileChanged();
  throw new HttpError(404, "This file no longer exists");
}

/** What is known of a file, however it was looked at. */
type FileInfo = Pick<
  Deno.FileInfo,
  "isFile" | "isDirectory" | "size" | "mtime" | "ctime" | "birthtime" | "ino" | "dev" | "nlink"
>;

/** An open file, read synchronously: for what the system has in memory, that is faster than another thread. */
interface OpenFile extends Disposable {
  stat(): FileInfo;
  /** Reads from `position` on, until the buffer is full or the file ends. Returns how many bytes were read. */
  read(buffer: Uint8Array, position: number): number;
}

/** Longest that opening a file may take, in milliseconds: a named pipe in its place would block for ever. */
const OPEN_TIME = 2000;
/** Whether that has happened: from then on, files are opened in the way that does not wait. */
let meetsPipes = false;

/** Opens what is at a path; undefined if nothing is, or if it does not open. */
async function openInTime(path: string): Promise<OpenFile | undefined> {
  if (meetsPipes) return openWithoutWaiting(await fileSystem(), path);
  const opening = Deno.open(path);
  const opened = opening.then(
    (file) => ({ file: openedByDeno(file) }),
    (error) => ({ file: undefinedIfAbsent(error) }),
  );
  const inTime = await within(OPEN_TIME, opened);
  if (inTime !== undefined) return inTime.file;
  meetsPipes = true;
  // A thread waits for the other end of the pipe. Should that come, it is not needed any more.
  opening.then((file) => file.close(), () => {});
  return openInTime(path);
}

function openedByDeno(file: Deno.FsFile): OpenFile {
  const read = (buffer: Uint8Array, position: number) => {
    file.seekSync(position, Deno.SeekMode.Start);
    return readFully((rest) => file.readSync(rest) ?? 0, buffer);
  };
  return { stat: () => file.statSync(), read, [Symbol.dispose]: () => file.close() };
}

type FileSystem = typeof import("node:fs");

/** Node's file system, loaded when it is first needed: everything is slower once it is there. */
const fileSystem = lazily(async (): Promise<FileSystem> => (await import("node:fs")).default);

/** The same by way of `node:fs`, which can be told not to wait, nor to follow a link. */
function openWithoutWaiting(fs: FileSystem, path: string): OpenFile | undefined {
  const { O_RDONLY, O_NONBLOCK = 0, O_NOFOLLOW = 0 } = fs.constants;
  const descriptor = ifPresent(() => fs.openSync(path, O_RDONLY | O_NONBLOCK | O_NOFOLLOW));
  if (descriptor === undefined) return undefined;
  const stat = () => {
    const stats = fs.fstatSync(descriptor), { size, mtime, birthtime, ino, dev, nlink } = stats;
    // Deno has no time of change on Windows.
    const ctime = Deno.build.os === "windows" ? null : stats.ctime;
    return { isFile: stats.isFile(), isDirectory: stats.isDirectory(), size, mtime, ctime, birthtime, ino, dev, nlink };
  };
  const read = (buffer: Uint8Array, position: number) =>
    readFully((rest) => fs.readSync(descriptor, rest, 0, rest.length, position + buffer.length - rest.length), buffer);
  return { stat, read, [Symbol.dispose]: () => fs.closeSync(descriptor) };
}

/** Reads until the buffer is full, or nothing more comes. Returns how many bytes were read. */
function readFully(readSome: (rest: Uint8Array) => number, buffer: Uint8Array): number {
  let length = 0;
  for (let count; length < buffer.length && (count = readSome(buffer.subarray(length))) > 0;) length += count;
  return length;
}

/** How many looks decide that something was reached without a link. */
const RACE_CHECKS = 40;

/**
 * Whether a path leads to this very thing without a link. There is no one call that says so, and a folder may be
 * swapped for a link, and back, between two. So the looks alternate: is the path free of links? does it lead to that
 * thing? Which of the two is asked is left to chance each time, so that no rhythm of swaps can suit all of them.
 */
function isReachedDirectly(path: string, isIt: (info: FileInfo) => boolean): boolean {
  const isFree = () => ifPresent(() => Deno.realPathSync(path)) === path;
  const leadsThere = () => {
    const info = lstatOf(path);
    return info !== undefined && isIt(info);
  };
  return Array.from({ length: RACE_CHECKS }).every(() => Math.random() < 0.5 ? isFree() : leadsThere());
}

/** A file that is too large to be kept. */
function streamedMessage(variant: Variant, samples: readonly Sample[]): StreamMessage {
  const content = isAsStored(variant) ? streamFile(variant.source, samples) : streamConverted(variant, samples);
  return { ...variantHead(variant), content };
}

/** The whole of something, as ranges. */
const ALL: readonly ByteRange[] = [{ start: 0, end: Infinity }];

/** A large file, as it is, as long as it was when it was looked at. */
function streamFile(source: FileFound, samples: readonly Sample[], pieceSize: number = PIECE_SIZE): Stream {
  return {
    length: source.size,
    async *read(ranges = ALL) {
      // Opened once: all ranges are of one file, whatever takes its place.
      using file = await openFile(source.evidence.site, source.path);
      const info = file.stat();
      if (!isSameFile(info, source.info) || info.size < source.size) throw fileChanged();
      const buffer = new Uint8Array(pieceSize);
      for (const { start, end } of ranges) {
        const last = Math.min(end, source.size);
        for (let at = start; at < last; at += pieceSize) {
          const piece = buffer.subarray(0, last - at);
          if (file.read(piece, at) < piece.length || !await keepsItsBytes(file, source.info, source.path, samples)) {
            throw fileChanged();
          }
          yield piece;
        }
      }
    },
  };
}

/** A large text in another charset: its length, and where in it the pieces of the file begin, as far as that is known. */
interface Conversion {
  length: number | undefined;
  /** Offsets in the file, and in what is sent: pieces from there on can be converted without those before. */
  readonly checkpoints: Checkpoint[];
}

interface Checkpoint {
  readonly from: number;
  readonly to: number;
}

/**
 * A large text file, decoded and encoded piece by piece. How long that becomes is known once somebody has got all of
 * it; until then, parts of it cannot be had (RFC 9110 §14.2 lets us send the whole).
 */
function streamConverted(variant: Variant, samples: readonly Sample[]): Stream {
  const key = keyOf(variant), { conversions } = variant.file;
  const conversion = conversions.get(key) ?? { length: undefined, checkpoints: [{ from: 0, to: 0 }] };
  conversions.set(key, conversion);
  return {
    length: conversion.length,
    async *read(ranges = ALL) {
      for (const { start, end } of ranges) {
        const checkpoint = conversion.checkpoints.findLast(({ to }) => to <= start)!;
        let at = checkpoint.to;
        for await (const piece of convertPieces({ ...variant, samples }, conversion, checkpoint)) {
          const part = piece.subarray(Math.max(0, start - at), Math.max(0, end - at));
          at += piece.length;
          if (part.length > 0) yield part;
          if (at >= end) break;
        }
      }
    },
  };
}

/** Converts a file from one of its checkpoints on, and notes those that come. */
async function* convertPieces(
  variant: Variant & Pick<Opened, "samples">,
  conversion: Conversion,
  { from, to }: Checkpoint,
): AsyncGenerator<Uint8Array> {
  const { file, nature, samples } = variant, stored = nature.encoding!, encoding = variant.encoding!, { type } = nature;
  const mode = errorModeOf(variant), mark = variant.hasMark ? "\ufeff" : "";
  const carry: Carry = { state: ASCII, isLast: false };
  // Only at the beginning of the file is U+FEFF a byte-order mark.
  const decoder = new TextDecoder(stored, { ignoreBOM: from > 0 });
  // Behind a line feed, an ASCII byte in all these, a decoder begins anew, and so does an encoder; but see ISO-2022-JP.
  const isSeekable = !/^(?:utf-16|iso-2022)/.test(stored) && encoding !== "iso-2022-jp";
  let sent = to;
  for await (const { bytes, end, isLast, isLineEnd } of blocksFrom(file, samples, from)) {
    await yieldToOthers();
    carry.isLast = isLast;
    const text = decoder.decode(bytes, { stream: !isLast });
    const corrected = sent === 0 ? mark + rewriteDeclarations(text, type, encoding) : text;
    const encoded = encodeText(corrected, encoding, mode, carry).bytes;
    sent += encoded.length;
    const isNew = sent > conversion.checkpoints.at(-1)!.to;
    if (isSeekable && isLineEnd && isNew) conversion.checkpoints.push({ from: end, to: sent });
    yield encoded;
  }
  conversion.length = sent;
}

/** Some of a file that is converted at once: whole lines, unless one is very long. */
interface Block {
  readonly bytes: Uint8Array;
  /** Where it ends in the file. */
  readonly end: number;
  readonly isLineEnd: boolean;
  readonly isLast: boolean;
}

async function* blocksFrom(file: FileFound, samples: readonly Sample[], from: number): AsyncGenerator<Block> {
  let rest = new Uint8Array(), read = from;
  for await (const piece of streamFile(file, samples, CONVERTED_PIECE).read([{ start: from, end: Infinity }])) {
    const bytes = rest.length > 0 ? concat([rest, piece]) : piece, isLast = (read += piece.length) >= file.size;
    // A declaration may stand anywhere in the first piece.
    const isFirst = read === piece.length, lineEnd = isLast ? bytes.length : isFirst ? 0 : bytes.lastIndexOf(LF) + 1;
    const length = lineEnd || bytes.length;
    rest = bytes.slice(length);
    yield { bytes: bytes.subarray(0, length), end: read - rest.length, isLineEnd: lineEnd > 0, isLast };
  }
}

/** Codings that a client accepts, unless it prefers the bytes uncompressed; best first (RFC 9110 §12.5.3). */
const acceptedCodings = memoized((accept: string | undefined): readonly Coding[] => {
  if (accept === undefined) return [];
  const qualities = parseAccept(accept);
  const quality = (coding: string) =>
    qualities.get(coding) ?? (coding === "gzip" ? qualities.get("x-gzip") : undefined) ?? qualities.get("*") ?? 0;
  const identity = qualities.get("identity") ?? 0;
  return (["br", "gzip"] as const).filter((coding) => quality(coding) > 0 && quality(coding) >= identity)
    .sort((a, b) => quality(b) - quality(a));
});

const COMPRESSION_FORMATS = { br: "brotli" as "gzip", gzip: "gzip" } as const;

/** The codings that this platform can make. */
const ownCodings = lazily(() => (["br", "gzip"] as const).filter(canCompress));

function canCompress(coding: Coding): boolean {
  try {
    new CompressionStream(COMPRESSION_FORMATS[coding]);
    return true;
  } catch {
    return false;
  }
}

/** Most content that waits to be compressed, in bytes; what comes then is sent as it is. */
const COMPRESSION_QUEUE = 16 * 1024 * 1024;
/** Compression is fed in pieces of this size, in bytes. */
const COMPRESSION_PIECE = 64 * 1024;

interface Compression {
  /** Of what is compressed, in bytes. */
  readonly size: number;
  readonly run: () => Promise<void>;
}

/** Compressions that wait: one at a time, since they work on this thread, and the smallest first. */
const compressions: Compression[] = [];
let isCompressing = false;

function canWait(size: number): boolean {
  return compressions.reduce((sum, waiting) => sum + waiting.size, size) <= COMPRESSION_QUEUE;
}

/** Compresses what `make` gives when its turn comes. */
function compress(size: number, coding: Coding, make: () => Uint8Array<ArrayBuffer>): Promise<Uint8Array<ArrayBuffer>> {
  const { promise, resolve, reject } = Promise.withResolvers<Uint8Array<ArrayBuffer>>();
  compressions.push({ size, run: () => compressNow(make, coding).then(resolve, reject) });
  if (!isCompressing) void compressAll();
  return promise;
}

async function compressAll(): Promise<void> {
  isCompressing = true;
  while (compressions.length > 0) {
    const smallest = compressions.reduce((a, b) => b.size < a.size ? b : a);
    compressions.splice(compressions.indexOf(smallest), 1);
    await smallest.run();
  }
  isCompressing = false;
}

async function compressNow(make: () => Uint8Array<ArrayBuffer>, coding: Coding): Promise<Uint8Array<ArrayBuffer>> {
  const bytes = make(), { readable, writable } = new CompressionStream(COMPRESSION_FORMATS[coding]);
  return (await Promise.all([new Response(readable).bytes(), writeAll(writable, bytes)]))[0];
}

/** Feeds a transformation in pieces, and lets others be served in between. */
async function writeAll(stream: WritableStream<BufferSource>, bytes: Uint8Array<ArrayBuffer>): Promise<void> {
  const writer = stream.getWriter();
  for (let at = 0; at < bytes.length; at += COMPRESSION_PIECE) {
    if (at > 0) await yieldToOthers();
    await writer.write(bytes.subarray(at, at + COMPRESSION_PIECE));
  }
  await writer.close();
}

// ── Preconditions and ranges ─────────────────────────────────────────────────────────────────────
// A client that has a copy asks "only if it changed", one that has a part asks for the rest, and one
// that wants to overwrite asks "only if nobody else did". The order of the questions is the RFC's.

/** What conditional requests compare with. */
interface Validators {
  /** Strong (RFC 9110 §8.8.3). */
  readonly etag: string;
  /** Last modification, in milliseconds. */
  readonly time: number;
}

/** A response, as the conditions and the range of a request want it. */
function applyConditions(head: RequestHead, message: Message): Message {
  const { validators } = message;
  if (validators === undefined) return message;
  return evaluatePreconditions(head, validators) === 304
    ? notModified(message)
    : resolveRange(head, message, validators);
}

/** RFC 9110 §13.2.2. Returns 200 or 304; throws 412. */
function evaluatePreconditions(head: RequestHead, { etag, time }: Validators): 200 | 304 {
  const ifMatch = fieldValue(head, "if-match"), ifNoneMatch = fieldValue(head, "if-none-match");
  const unmodifiedSince = fieldValue(head, "if-unmodified-since"),
    modifiedSince = fieldValue(head, "if-modified-since");
  if ((ifMatch ?? ifNoneMatch ?? unmodifiedSince ?? modifiedSince) === undefined) return 200;
  // HTTP dates have no milliseconds. A date that is no date is ignored: comparing with NaN is false.
  const modified = Math.trunc(time / 1000) * 1000, isReading = head.method === "GET" || head.method === "HEAD";
  const hasChanged = ifMatch !== undefined
    ? !matchesTag(ifMatch, etag, "strong")
    : modified > parseDate(unmodifiedSince ?? "");
  if (hasChanged) throw new HttpError(412, "The file has changed, or is another one", [["ETag", etag]]);
  const isKnown = ifNoneMatch !== undefined
    ? matchesTag(ifNoneMatch, etag, "weak")
    : isReading && isPast(modified) && modified <= parseDate(modifiedSince ?? "");
  if (!isKnown) return 200;
  if (isReading) return 304;
  throw new HttpError(412, "The file exists", [["ETag", etag]]);
}

/** Whether a second is over: until then, what is modified again keeps its date (RFC 9110 §8.8.2.2). */
function isPast(time: number): boolean {
  return Math.trunc(time / 1000) < Math.trunc(Date.now() / 1000);
}

/** Whether a list of entity tags has this one (RFC 9110 §8.8.3.2). */
function matchesTag(list: string, etag: string, comparison: "strong" | "weak"): boolean {
  if (list === "*") return true;
  return [...list.matchAll(/(W\/)?("[\x21\x23-\x7e\x80-\xff]*")/g)]
    .some(([, weak, tag]) => tag === etag && !(weak && comparison === "strong"));
}

/** RFC 9110 §15.4.5: the fields that a cache needs, no content. */
function notModified(message: Message): WholeMessage {
  const kept = isWhole(message) ? message.kept : undefined;
  if (kept?.notModified !== undefined) return kept.notModified;
  const fields = message.fields.filter(([name]) => /^(?:ETag|Cache-Control|Vary|Last-Modified)$/.test(name));
  const made: WholeMessage = { status: 304, fields, content: NO_BYTES, charset: message.charset };
  if (kept === undefined) return made;
  return kept.notModified = { ...made, kept: { date: "", composed: [] } };
}

/** Most ranges of one request; more get the whole (RFC 9110 §17.15). */
const RANGE_LIMIT = 16;

/** A part of the content: from `start` up to, not including, `end`. */
interface ByteRange {
  readonly start: number;
  readonly end: number;
}

/**
 * The byte ranges of a Range field (RFC 9110 §14.1.2) that `length` bytes can satisfy: several, none
 * (416), or undefined if the field is to be ignored: malformed, another unit, or a flood.
 */
function parseRange(value: string, length: number): ByteRange[] | undefined {
  const set = /^bytes=(?<ranges>[\d\-, \t]+)$/i.exec(value)?.groups?.ranges;
  const ranges: ByteRange[] = [], specs = set === undefined ? [] : parseList(set);
  if (specs.length === 0 || specs.length > RANGE_LIMIT) return undefined;
  for (const spec of specs) {
    // A number too large to be exact lies beyond the end of any file: rounding does no harm.
    const [, first, last] = /^(\d*)-(\d*)$/.exec(spec) ?? [];
    if (first === undefined || last === undefined || first + last === "") return undefined;
    const isSuffix = first === "", start = isSuffix ? Math.max(0, length - Number(last)) : Number(first);
    const end = isSuffix || last === "" ? length : Math.min(length, Number(last) + 1);
    if (!isSuffix && last !== "" && Number(last) < start) return undefined;
    if (start < end) ranges.push({ start, end });
  }
  // Ranges that overlap ask for more than there is.
  const sorted = ranges.toSorted((a, b) => a.start - b.start);
  return sorted.some(({ start }, i) => i > 0 && start < sorted[i - 1]!.end) ? undefined : ranges;
}

/** The part of the content that a Range field asks for (RFC 9110 §14.2): 206, 416, or the whole. */
function resolveRange(head: RequestHead, whole: Message, { etag, time }: Validators): Message {
  const asked = head.method === "GET" ? fieldValue(head, "range") : undefined, { length } = whole.content;
  // What has no length yet, or no bytes, has no parts: the whole is sent.
  if (asked === undefined || !length) return whole;
  const condition = fieldValue(head, "if-range");
  const isSame = condition === undefined || condition === etag || isPast(time) && condition === formatDate(time);
  const ranges = isSame ? parseRange(asked, length) : undefined;
  if (ranges === undefined) return whole;
  if (ranges.length === 0) {
    throw new HttpError(416, "No byte of the file is in that range", [["Content-Range", `bytes */${length}`]]);
  }
  const parts = ranges.map((range): Part => ({
    ...range,
    field: ["Content-Range", `bytes ${range.start}-${range.end - 1}/${length}`],
  }));
  const [only] = parts, type = whole.fields.find(([name]) => name === "Content-Type")!;
  const { charset } = whole, status = 206;
  if (parts.length === 1) {
    return withContent({ status, charset, fields: [...whole.fields, only!.field] }, slice(whole.content, parts));
  }
  // RFC 9110 §14.6: each part has its own head, and the boundary stands in no part.
  const boundary = crypto.randomUUID(), fields = whole.fields.filter((field) => field !== type);
  return withContent(
    { status, charset, fields: [["Content-Type", `multipart/byteranges; boundary=${boundary}`], ...fields] },
    slice(whole.content, multipart(parts, type, boundary)),
  );
}

/** A part of the content, and the field that says which. */
interface Part extends ByteRange {
  readonly field: Field;
}

function multipart(parts: readonly Part[], type: Field, boundary: string): (ByteRange | Uint8Array)[] {
  const heads = parts.map(({ field }) =>
    latin1Bytes(`\r\n--${boundary}\r\n${type.join(": ")}\r\n${field.join(": ")}\r\n\r\n`)
  );
  return [...parts.flatMap((part, i) => [heads[i]!, part]), latin1Bytes(`\r\n--${boundary}--\r\n`)];
}

/** Content made of parts of other content, and of bytes between them. */
function slice(content: Uint8Array | Stream, parts: readonly (ByteRange | Uint8Array)[]): Uint8Array | Stream {
  if (content instanceof Uint8Array) {
    return concat(parts.map((part) => part instanceof Uint8Array ? part : content.subarray(part.start, part.end)));
  }
  return {
    length: parts.reduce((sum, part) => sum + (part instanceof Uint8Array ? part.length : part.end - part.start), 0),
    async *read() {
      const rest = [...parts], ranges = parts.filter((part): part is ByteRange => !(part instanceof Uint8Array));
      let left = 0;
      for await (const piece of content.read(ranges)) {
        // What stands before a part goes with its first piece: if that cannot be had, an error page still can.
        const before: Uint8Array[] = [];
        for (let part; left === 0 && (part = rest.shift()) !== undefined;) {
          if (part instanceof Uint8Array) before.push(part);
          else left = part.end - part.start;
        }
        left -= piece.length;
        yield before.length > 0 ? concat([...before, piece]) : piece;
      }
      for (const part of rest) if (part instanceof Uint8Array) yield part;
    },
  };
}

// ── Response ─────────────────────────────────────────────────────────────────────────────────────
// What the stages before have decided becomes bytes. One function writes heads.

/** A response, ready but for what depends on the connection. */
type Message = WholeMessage | StreamMessage;

interface MessageParts {
  readonly status: number;
  readonly fields: readonly Field[];
  /** The charset it is sent in, for the log. */
  readonly charset?: string | undefined;
  /** How many characters the charset lacked. */
  readonly lost?: number;
  /** Why the request was refused, for the log. */
  readonly reason?: string;
  /** It shows what is in a folder, not something that was asked for by its name. */
  readonly isListing?: boolean;
  /** What conditional requests are answered by. */
  readonly validators?: Validators;
}

/** A response whose content is there. */
interface WholeMessage extends MessageParts {
  readonly content: Uint8Array;
  /** Present if it will be sent again. */
  readonly kept?: Kept | undefined;
}

/** A response whose content is made on the way. */
interface StreamMessage extends MessageParts {
  readonly content: Stream;
}

/** A response as it was sent before, in its kinds: they are good as long as their Date is. */
interface Kept {
  date: string;
  composed: (Uint8Array<ArrayBuffer> | undefined)[];
  notModified?: WholeMessage;
}

/** Tells whoever makes the content that it is not wanted. */
function cancelContent({ content }: Message): void {
  if (!(content instanceof Uint8Array)) inBackground(() => content.cancel?.());
}

function withContent(parts: MessageParts, content: Uint8Array | Stream): Message {
  return content instanceof Uint8Array ? { ...parts, content } : { ...parts, content };
}

function isWhole(message: Message): message is WholeMessage {
  return message.content instanceof Uint8Array;
}

const NO_BYTES = new Uint8Array();
const CONTINUE = new TextEncoder().encode("HTTP/1.1 100 Continue\r\n\r\n");

const CRLF = new TextEncoder().encode("\r\n"), LAST_CHUNK = new TextEncoder().encode("0\r\n\r\n");

/** A response's head (RFC 9112 §4, RFC 9110 §6.6, §8.6). */
function formatHead(server: HttpServer, message: Message, head: RequestHead, persistent: boolean): string {
  const { status, fields, content } = message,
    added = takesCachingFields(message) ? server.added : server.addedUncached;
  let text = `HTTP/1.1 ${status} ${REASONS[status] ?? ""}\r\nDate: ${server.date()}\r\n`;
  for (const [name, value] of fields) {
    if (added.names.size === 0 || !added.names.has(name.toLowerCase())) text += `${name}: ${value}\r\n`;
  }
  text += added.text;
  // HTTP/1.0 knows no chunks: there the end of the connection is the end.
  if (!hasNoContent(status)) {
    if (content.length !== undefined) text += `Content-Length: ${content.length}\r\n`;
    else if (head.minor === 1) text += "Transfer-Encoding: chunked\r\n";
  }
  if (!persistent) text += "Connection: close\r\n";
  else if (head.minor === 0) text += "Connection: keep-alive\r\n";
  return text + "\r\n";
}

/** Fields that are added to every response: as text, and the names that they replace. */
interface AddedFields {
  readonly text: string;
  readonly names: ReadonlySet<string>;
}

/** Whether what `--header` says about caching is meant for this: never for errors, redirects and listings. */
function takesCachingFields({ status, isListing }: Message): boolean {
  return (status < 300 || status === 304) && !isListing;
}

/** Statuses whose responses end with their head (RFC 9112 §6.3). */
function hasNoContent(status: number): boolean {
  return status === 204 || status === 304;
}

/** Head and content in one piece, for one write. */
function composeMessage(
  server: HttpServer,
  message: WholeMessage,
  head: RequestHead,
  persistent: boolean,
): Uint8Array<ArrayBuffer> {
  const text = formatHead(server, message, head, persistent);
  const length = head.method === "HEAD" || hasNoContent(message.status) ? 0 : message.content.length;
  const bytes = allocate(text.length + length);
  writeLatin1(text, bytes);
  if (length > 0) bytes.set(message.content, text.length);
  return bytes;
}

/** A piece of content with what stands before it; as chunks, if a size is given (RFC 9112 §7.1). */
function framePiece(before: Uint8Array, piece: Uint8Array, chunkSize: number | undefined): Uint8Array {
  if (chunkSize === undefined) return before.length === 0 ? piece : concat([before, piece]);
  const parts = [before];
  let head: Uint8Array = NO_BYTES, length = 0;
  for (let at = 0; at < piece.length; at += chunkSize) {
    const chunk = piece.subarray(at, at + chunkSize);
    if (chunk.length !== length) head = latin1Bytes(`${(length = chunk.length).toString(16)}\r\n`);
    parts.push(head, chunk, CRLF);
  }
  return concat(parts);
}

// ── Charset ──────────────────────────────────────────────────────────────────────────────────────
// A charset is a rule that turns characters into bytes. The platform decodes all of them and encodes
// only UTF-8, so an encoder is made from the platform's decoder when it is first needed: decode every
// byte sequence, note which character came out, and look characters up in what was noted.
//
// An encoder is not exactly the inverse of its decoder, and each exception is written down where it is
// made: sequences that are read but never written, characters with several sequences, characters
// written without being read back (Encoding §9 to §14).

/** What to do with a character that a charset lacks, in the words of Encoding §4.1 ("error mode"). */
export type Unmappable = "html" | "replacement" | "fatal";

/** Every label of the Encoding Standard §4.2, but those of "replacement", which encode nothing. */
const LABELS = `
  unicode-1-1-utf-8 unicode11utf8 unicode20utf8 utf-8 utf8 x-unicode20utf8 866 cp866 csibm866 ibm866
  csisolatin2 iso-8859-2 iso-ir-101 iso8859-2 iso88592 iso_8859-2 iso_8859-2:1987 l2 latin2 csisolatin3
  iso-8859-3 iso-ir-109 iso8859-3 iso88593 iso_8859-3 iso_8859-3:1988 l3 latin3 csisolatin4 iso-8859-4
  iso-ir-110 iso8859-4 iso88594 iso_8859-4 iso_8859-4:1988 l4 latin4 csisolatincyrillic cyrillic
  iso-8859-5 iso-ir-144 iso8859-5 iso88595 iso_8859-5 iso_8859-5:1988 arabic asmo-708 csiso88596e
  csiso88596i csisolatinarabic ecma-114 iso-8859-6 iso-8859-6-e iso-8859-6-i iso-ir-127 iso8859-6
  iso88596 iso_8859-6 iso_8859-6:1987 csisolatingreek ecma-118 elot_928 greek greek8 iso-8859-7
  iso-ir-126 iso8859-7 iso88597 iso_8859-7 iso_8859-7:1987 sun_eu_greek csiso88598e csisolatinhebrew
  hebrew iso-8859-8 iso-8859-8-e iso-ir-138 iso8859-8 iso88598 iso_8859-8 iso_8859-8:1988 visual
  csiso88598i iso-8859-8-i logical csisolatin6 iso-8859-10 iso-ir-157 iso8859-10 iso885910 l6 latin6
  iso-8859-13 iso8859-13 iso885913 iso-8859-14 iso8859-14 iso885914 csisolatin9 iso-8859-15 iso8859-15
  iso885915 iso_8859-15 l9 iso-8859-16 cskoi8r koi koi8 koi8-r koi8_r koi8-ru koi8-u csmacintosh mac
  macintosh x-mac-roman dos-874 iso-8859-11 iso8859-11 iso885911 tis-620 windows-874 cp1250 windows-1250
  x-cp1250 cp1251 windows-1251 x-cp1251 ansi_x3.4-1968 ascii cp1252 cp819 csisolatin1 ibm819 iso-8859-1
  iso-ir-100 iso8859-1 iso88591 iso_8859-1 iso_8859-1:1987 l1 latin1 us-ascii windows-1252 x-cp1252
  cp1253 windows-1253 x-cp1253 cp1254 csisolatin5 iso-8859-9 iso-ir-148 iso8859-9 iso88599 iso_8859-9
  iso_8859-9:1989 l5 latin5 windows-1254 x-cp1254 cp1255 windows-1255 x-cp1255 cp1256 windows-1256
  x-cp1256 cp1257 windows-1257 x-cp1257 cp1258 windows-1258 x-cp1258 x-mac-cyrillic x-mac-ukrainian
  chinese csgb2312 csiso58gb231280 gb2312 gb_2312 gb_2312-80 gbk iso-ir-58 x-gbk gb18030 big5 big5-hkscs
  cn-big5 csbig5 x-x-big5 cseucpkdfmtjapanese euc-jp x-euc-jp csiso2022jp iso-2022-jp csshiftjis ms932
  ms_kanji shift-jis shift_jis sjis windows-31j x-sjis cseuckr csksc56011987 euc-kr iso-ir-149 korean
  ks_c_5601-1987 ks_c_5601-1989 ksc5601 ksc_5601 windows-949 unicodefffe utf-16be csunicode
  iso-10646-ucs-2 ucs-2 unicode unicodefeff utf-16 utf-16le x-user-defined`.trim().split(/\s+/);

/** The encodings' names (lower case) with all their labels. */
const encodings = lazily((): ReadonlyMap<string, readonly string[]> =>
  Map.groupBy(LABELS, (label) => encodingOf(label))
);

/** Names that labels were found to stand for. */
const NAMES = new Map<string, string>();

/** Name of the encoding that a label stands for (Encoding §4.2); `RangeError` if it stands for none. */
function encodingOf(label: string): string {
  const known = NAMES.get(label);
  if (known !== undefined) return known;
  try {
    const { encoding } = new TextDecoder(label);
    if (LABELS.includes(label)) NAMES.set(label, encoding);
    return encoding;
  } catch {
    const near = suggestLabel(label), meant = near === undefined ? "" : `, did you mean ${encodingOf(near)}?`;
    throw new RangeError(
      `The charset "${escapeControls(label.slice(0, 40))}" does not exist or cannot be written${meant}`,
    );
  }
}

/** What people write for labels that the Encoding Standard lacks: code pages, names of databases and editors. */
// deno-fmt-ignore
const ALIASES: Readonly<Record<string, string>> = {
  "utf-8": "65001 utf utf8mb3 utf8mb4", "utf-16le": "1200", "utf-16be": "1201", gbk: "936 51936 euccn",
  gb18030: "54936", big5: "950", shift_jis: "932 sjiswin", "euc-jp": "20932 51932 eucjpms ujis", "euc-kr": "949 51949 uhc",
  "koi8-r": "20866", "koi8-u": "21866", macintosh: "10000 macroman", "windows-1252": "ansi", "iso-8859-13": "latin7",
  "iso-8859-14": "latin8", "iso-8859-15": "latin9", "iso-8859-16": "latin10",
};

/** The label that somebody means who writes one that does not exist; none if that is anyone's guess. */
function suggestLabel(typed: string): string | undefined {
  const plain = (label: string) => label.toLowerCase().replace(/[^a-z0-9]/g, "").replace(/^x(?=\D)/, "");
  const name = plain(typed.slice(0, 40)), page = name.replace(/^(?:cp|ibm|ms|windows|win|iso)(?=\d+$)/, "");
  const alias = Object.entries(ALIASES).find(([, aliases]) => aliases.split(" ").includes(page))?.[0];
  const names = [name, `windows${page}`, `ibm${page}`, `iso${page}`];
  const same = alias ?? LABELS.find((label) => names.includes(plain(label)));
  if (same !== undefined || typed.length > 40) return same;
  // A number that is off by a digit is another charset's: only swapped digits, or a single one, may be mistaken.
  const digits = (label: string) => label.replace(/\D/g, "").split("").sort().join("");
  const candidates = LABELS.filter((label) => digits(typed).length < 2 || digits(label) === digits(typed));
  return nearest(typed.toLowerCase(), candidates.filter((label) => !label.startsWith("cs")), name.length / 3);
}

/**
 * Encodes text as a browser does that submits a form from a page in that charset (Encoding §4.4,
 * "encode"). A lone surrogate counts as U+FFFD. No byte-order mark is written.
 *
 * ```ts
 * import { encode } from "./server.ts";
 * encode("你好", "gbk"); // C4 E3 BA C3
 * encode("€", "big5", "html"); // A3 E1
 * encode("é", "gbk", "replacement"); // A8 A6
 * ```
 *
 * @param text What to encode.
 * @param label Any label of the Encoding Standard, in any case: `gbk`, `gb2312`, `Shift_JIS`, …
 * @param mode What becomes of a character that the charset lacks: `html` writes its character
 * reference (`&#N;`), `replacement` a question mark, `fatal` throws.
 * @returns The bytes: those of a short text are a part of a larger buffer.
 * @throws {RangeError} The label is unknown, or belongs to the "replacement" encoding.
 * @throws {TypeError} In mode `fatal`, naming the first character that the charset lacks.
 */
export function encode(text: string, label: string, mode: Unmappable = "html"): Uint8Array<ArrayBuffer> {
  return encodeText(text, encodingOf(label), mode).bytes;
}

/** Encoded text, and how many characters were lost: written otherwise than as themselves. */
interface Encoded {
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly lost: number;
}

/** What the encoder with a state carries from one piece of a text to the next. */
interface Carry {
  state: number;
  isLast: boolean;
}

/** Encodes a text, or one piece of a longer one. */
function encodeText(text: string, encoding: string, mode: Unmappable, carry?: Carry): Encoded {
  if (encoding === "utf-8") return { bytes: UTF8_ENCODER.encode(text), lost: 0 };
  if (encoding.startsWith("utf-16")) return { bytes: encodeUtf16(text, encoding === "utf-16be"), lost: 0 };
  const writer = new Writer(encoding, mode, text.length);
  if (encoding === "iso-2022-jp") writeIso2022Jp(text, repertoireOf(encoding), writer, carry);
  else writeTable(text, repertoireOf(encoding), writer);
  return { bytes: writer.bytes.subarray(0, writer.length), lost: writer.lost };
}

/** What encoders write into: a buffer that grows, and what becomes of characters that the charset lacks. */
class Writer {
  bytes: Uint8Array<ArrayBuffer>;
  length = 0;
  lost = 0;

  constructor(readonly encoding: string, readonly mode: Unmappable, characters: number) {
    // Two bytes a UTF-16 code unit are enough for all but `&#N;` and four-byte sequences.
    this.bytes = allocate(characters * (isMultiByte(encoding) ? 2 : 1) + 16);
  }

  /** Makes room for `count` bytes and `units` code units that may follow. */
  reserve(count: number, units: number): void {
    const needed = this.length + count + units * 2 + 16;
    if (needed <= this.bytes.length) return;
    const larger = new Uint8Array(needed + (needed >> 2));
    larger.set(this.bytes.subarray(0, this.length));
    this.bytes = larger;
  }

  /** Encoding §4.1: what the error mode makes of a character. */
  writeUnmappable(codePoint: number, units: number): void {
    this.lost++;
    if (this.mode === "fatal") {
      throw new TypeError(
        `The charset ${this.encoding} has no ${codePointName(codePoint)} (${String.fromCodePoint(codePoint)})`,
      );
    }
    const instead = this.mode === "html" ? `&#${codePoint};` : "?";
    this.reserve(instead.length, units);
    for (let i = 0; i < instead.length; i++) this.bytes[this.length++] = instead.charCodeAt(i);
  }
}

/** What a charset can write: the bytes of each character, as one number with the first byte highest. */
interface Repertoire {
  /** By UTF-16 code unit: one byte, or two where there are pairs; 0 if the charset lacks it. */
  readonly units: Uint8Array | Uint16Array;
  /** Two bytes by code point, above U+FFFF. */
  readonly astral?: ReadonlyMap<number, number>;
  /** gb18030's four-byte pointers, plus one, by code unit. */
  readonly pointers?: Uint16Array;
}

/** Every charset whose bytes are looked up: ASCII, then a table (Encoding §9.2, §10, §11, §12, §14). */
function writeTable(text: string, repertoire: Repertoire, writer: Writer): void {
  const { units } = repertoire, writeKnown = units instanceof Uint8Array ? writeSingles : writePairs;
  for (let at = 0; (at = writeKnown(text, at, units, writer)) < text.length; at++) {
    if (writeRare(text, at, repertoire, writer)) at++;
  }
}

// Encoding spends its time in these two loops. Rare characters are left to other functions, so that the loops stay
// fast. Each returns where it met a unit that its table lacks.

function writeSingles(text: string, at: number, table: Uint8Array | Uint16Array, writer: Writer): number {
  const { bytes } = writer, end = text.length;
  let { length } = writer;
  for (; at < end; at++) {
    const unit = text.charCodeAt(at), code = table[unit]!;
    if (code === 0 && unit !== 0) break;
    bytes[length++] = code;
  }
  writer.length = length;
  return at;
}

function writePairs(text: string, at: number, table: Uint8Array | Uint16Array, writer: Writer): number {
  const { bytes } = writer;
  let { length } = writer;
  for (; at < text.length; at++) {
    const unit = text.charCodeAt(at), code = table[unit]!;
    if (code === 0 && unit !== 0) break;
    // One byte or two, without a branch: in mixed text, nothing could predict it.
    const wide = (0xff - code) >>> 31;
    bytes[length] = code >> (wide << 3);
    bytes[length + 1] = code;
    length += 1 + wide;
  }
  writer.length = length;
  return at;
}

/** Writes what the table of units lacks. Returns whether it took two units. */
function writeRare(text: string, at: number, { astral, pointers }: Repertoire, writer: Writer): boolean {
  const codePoint = scalarAt(text, at), wide = codePoint > 0xffff, rest = text.length - at;
  const code = astral?.get(codePoint);
  if (code !== undefined) {
    writer.bytes[writer.length++] = code >> 8;
    writer.bytes[writer.length++] = code;
  } else if (pointers !== undefined && (wide || pointers[codePoint] !== 0)) {
    // §10.2.2: four bytes are a pointer in base 10, 126, 10 and 126; the astral planes are one run.
    const pointer = wide ? 189000 + codePoint - 0x10000 : pointers[codePoint]! - 1;
    writer.reserve(4, rest);
    writer.bytes[writer.length++] = 0x81 + Math.trunc(pointer / 12600);
    writer.bytes[writer.length++] = 0x30 + Math.trunc(pointer / 1260) % 10;
    writer.bytes[writer.length++] = 0x81 + Math.trunc(pointer / 10) % 126;
    writer.bytes[writer.length++] = 0x30 + pointer % 10;
  } else writer.writeUnmappable(codePoint, rest);
  return wide;
}

/** `U+4F60`. */
function codePointName(codePoint: number): string {
  return `U+${codePoint.toString(16).toUpperCase().padStart(4, "0")}`;
}

/** The code point at an index; a lone surrogate is U+FFFD. */
function scalarAt(text: string, at: number): number {
  const codePoint = text.codePointAt(at)!;
  return codePoint >= 0xd800 && codePoint <= 0xdfff ? 0xfffd : codePoint;
}

/** ISO-2022-JP's states and the escape sequence that enters each (Encoding §12.2.2). */
const ASCII = 0, ROMAN = 1, JIS0208 = 2;
const ESCAPES = [[0x1b, 0x28, 0x42], [0x1b, 0x28, 0x4a], [0x1b, 0x24, 0x42]];

/** The one encoder with a state: escape sequences switch between ASCII, JIS X 0201 Roman, and JIS X 0208. */
function writeIso2022Jp(
  text: string,
  { units }: Repertoire,
  writer: Writer,
  carry: Carry = { state: ASCII, isLast: true },
): void {
  let { state } = carry;
  const enter = (next: number) => {
    if (state !== next) writer.bytes.set(ESCAPES[state = next]!, (writer.length += 3) - 3);
  };
  for (let i = 0; i < text.length; i++) {
    const codePoint = scalarAt(text, i);
    writer.reserve(8, text.length - i);
    if (codePoint > 0xffff) i++;
    const roman = codePoint === 0xa5 ? 0x5c : codePoint === 0x203e ? 0x7e : 0;
    const code = units[codePoint] ?? 0;
    if (codePoint < 0x80) {
      // Roman is ASCII but for two characters. What could be an escape sequence is an error.
      if (state !== ROMAN || codePoint === 0x5c || codePoint === 0x7e) enter(ASCII);
      if (codePoint === 0x0e || codePoint === 0x0f || codePoint === 0x1b) {
        writer.writeUnmappable(0xfffd, text.length - i);
      } else writer.bytes[writer.length++] = codePoint;
    } else if (roman !== 0) {
      enter(ROMAN);
      writer.bytes[writer.length++] = roman;
    } else if (code !== 0) {
      enter(JIS0208);
      writer.bytes[writer.length++] = code >> 8;
      writer.bytes[writer.length++] = code;
    } else {
      if (state === JIS0208) enter(ASCII);
      writer.writeUnmappable(codePoint, text.length - i);
    }
  }
  writer.reserve(3, 0);
  if (carry.isLast) enter(ASCII);
  carry.state = state;
}

/** Two bytes a code unit. No browser submits UTF-16; a server may send it (Encoding §14.3, §14.4). */
function encodeUtf16(text: string, bigEndian: boolean): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(text.length * 2), view = new DataView(bytes.buffer), units = text.toWellFormed();
  for (let i = 0; i < units.length; i++) view.setUint16(i * 2, units.charCodeAt(i), !bigEndian);
  return bytes;
}

/** The tables made so far, on first use: 64 KiB for single bytes, 128 for pairs. */
const REPERTOIRES = new Map<string, Repertoire>();

function repertoireOf(encoding: string): Repertoire {
  let repertoire = REPERTOIRES.get(encoding);
  if (repertoire === undefined) {
    repertoire = (REPERTOIRE_MAKERS[encoding] ?? singleByteRepertoire)(encoding);
    for (let unit = 0; unit < 0x80; unit++) repertoire.units[unit] = unit;
    REPERTOIRES.set(encoding, repertoire);
  }
  return repertoire;
}

const REPERTOIRE_MAKERS: Readonly<Record<string, (encoding: string) => Repertoire>> = {
  gbk: gbRepertoire,
  gb18030: gbRepertoire,
  big5: big5Repertoire,
  "euc-jp": eucJpRepertoire,
  "iso-2022-jp": iso2022JpRepertoire,
  shift_jis: shiftJisRepertoire,
  "euc-kr": (encoding) => ({ units: pairs(encoding, numbers(0x81, 0xfe), numbers(0x41, 0xfe)).units }),
};

const isMultiByte = (encoding: string): boolean => encoding in REPERTOIRE_MAKERS;

function numbers(first: number, last: number): number[] {
  return Array.from({ length: last - first + 1 }, (_, i) => first + i);
}

/** Encoding §9.2: one byte a character. */
function singleByteRepertoire(encoding: string): Repertoire {
  const units = new Uint8Array(0x10000);
  const text = new TextDecoder(encoding).decode(Uint8Array.from(numbers(0x80, 0xff)));
  for (let i = 0; i < 0x80; i++) units[text.charCodeAt(i)] = 0x80 + i;
  units[0xfffd] = 0;
  return { units };
}

/**
 * What all pairs of these lead and trail bytes decode to, inverted. They are decoded in one call,
 * a line feed behind each, since an undefined pair may yield two characters: no trail byte is a line
 * feed, so there a decoder always begins anew. Of several pairs the first wins, or the last where
 * `lastWins` says so.
 */
function pairs(encoding: string, leads: readonly number[], trails: readonly number[], lastWins = "") {
  const units = new Uint16Array(0x10000), astral = new Map<number, number>();
  const sequences = new Uint8Array(leads.length * trails.length * 3);
  let end = 0;
  for (const lead of leads) {
    for (const trail of trails) sequences[end++] = lead, sequences[end++] = trail, sequences[end++] = LF;
  }
  const text = new TextDecoder(encoding).decode(sequences);
  for (let at = 0, i = 0; at < text.length; at = text.indexOf("\n", at) + 1, i += 3) {
    const codePoint = text.codePointAt(at)!, wide = codePoint > 0xffff;
    if (codePoint === 0xfffd || text.charCodeAt(at + (wide ? 2 : 1)) !== LF) continue;
    const code = sequences[i]! << 8 | sequences[i + 1]!;
    if (wide) astral.set(codePoint, astral.get(codePoint) ?? code);
    else if (units[codePoint] === 0 || lastWins.includes(text[at]!)) units[codePoint] = code;
  }
  return { units, astral };
}

/** Private-use characters of GBK that Unicode has named since: written still, no longer read (Encoding §10.2.2). */
const GB_PRIVATE_USE: readonly (readonly [codePoint: number, code: number, count: number])[] = [
  [0xe78d, 0xa6d9, 7],
  [0xe794, 0xa6ec, 2],
  [0xe796, 0xa6f3, 1],
  [0xe81e, 0xfe59, 1],
  [0xe826, 0xfe61, 1],
  [0xe82b, 0xfe66, 2],
  [0xe832, 0xfe6d, 1],
  [0xe843, 0xfe7e, 1],
  [0xe854, 0xfe90, 1],
  [0xe864, 0xfea0, 1],
];

/** gbk and gb18030 (Encoding §10): one table of pairs; gbk has the euro in one byte and no four-byte sequences. */
function gbRepertoire(encoding: string): Repertoire {
  const { units } = pairs("gb18030", numbers(0x81, 0xfe), numbers(0x40, 0xfe));
  for (const [codePoint, code, count] of GB_PRIVATE_USE) {
    for (let i = 0; i < count; i++) units[codePoint + i] = code + i;
  }
  units[0xe5e5] = 0; // §10.2.2: an error, since A3A0 reads as U+3000.
  if (encoding === "gbk") {
    units[0x20ac] = 0x80;
    return { units };
  }
  const pointers = new Uint16Array(0x10000), sequences = new Uint8Array(39420 * 4);
  for (let i = 0; i < 39420; i++) {
    sequences.set([
      0x81 + Math.trunc(i / 12600),
      0x30 + Math.trunc(i / 1260) % 10,
      0x81 + Math.trunc(i / 10) % 126,
      0x30 + i % 10,
    ], i * 4);
  }
  const text = new TextDecoder(encoding).decode(sequences);
  for (let i = 0; i < 39420; i++) pointers[text.charCodeAt(i)] = i + 1;
  pointers[0xe5e5] = 0;
  return { units, pointers };
}

/** Encoding §11.1: nothing below lead byte A1 (the Hong Kong extensions there) is ever written. */
function big5Repertoire(encoding: string): Repertoire {
  return pairs(encoding, numbers(0xa1, 0xfe), numbers(0x40, 0xfe), "═╞╡╪十卅");
}

/** Encoding §12.1: JIS X 0208 and half-width katakana; three-byte JIS X 0212 is read, never written. */
function eucJpRepertoire(encoding: string): Repertoire {
  const { units } = pairs(encoding, numbers(0xa1, 0xfe), numbers(0xa1, 0xfe));
  for (let i = 0; i < 63; i++) units[0xff61 + i] = 0x8ea1 + i;
  return { units: withJapaneseSigns(units) };
}

/** The yen sign and the overline stand where ASCII has \ and ~; the minus sign is the full-width one. */
function withJapaneseSigns(units: Uint16Array): Uint16Array {
  units[0xa5] = 0x5c;
  units[0x203e] = 0x7e;
  units[0x2212] = units[0xff0d]!;
  return units;
}

/** Encoding §12.2: JIS X 0208 in seven bits; half-width katakana become full-width. */
function iso2022JpRepertoire(): Repertoire {
  const units = eucJpRepertoire("euc-jp").units.map((code) => code >= 0xa1a1 ? code & 0x7f7f : 0);
  for (let unit = 0xff61; unit <= 0xff9f; unit++) {
    // Normalization makes the two sound marks combining; here they stand alone.
    const wide = unit === 0xff9e
      ? 0x309b
      : unit === 0xff9f
      ? 0x309c
      : String.fromCharCode(unit).normalize("NFKC").charCodeAt(0);
    units[unit] = units[wide]!;
  }
  return { units };
}

/** Encoding §12.3: leads ED to EF (pointers 8272 to 8835) and F0 to F9 (user-defined) are read, never written. */
function shiftJisRepertoire(encoding: string): Repertoire {
  const leads = [...numbers(0x81, 0x9f), ...numbers(0xe0, 0xec), ...numbers(0xfa, 0xfc)];
  const { units } = pairs(encoding, leads, numbers(0x40, 0xfc));
  units[0x80] = 0x80;
  for (let i = 0; i < 63; i++) units[0xff61 + i] = 0xa1 + i;
  return { units: withJapaneseSigns(units) };
}

/** Decodes as the platform does (Encoding §4.1, "decode"): never throws, drops a byte-order mark. */
function decodeText(bytes: Uint8Array, encoding: string): string {
  return new TextDecoder(encoding).decode(bytes);
}

/** Whether all of the bytes are text of that encoding; `partial` allows a character cut off at the end. */
function isValid(bytes: Uint8Array, encoding: string, partial = false): boolean {
  const text = new TextDecoder(encoding, { ignoreBOM: true }).decode(bytes, { stream: partial });
  if (!text.includes("\ufffd")) return true;
  // U+FFFD may itself be there. A decoder that throws would be slower than all of this.
  const { bytes: again, lost } = encodeText(text, encoding, "replacement");
  return /^(?:utf-|gb18030)/.test(encoding) && lost === 0 && again.every((byte, i) => byte === bytes[i]);
}

/** The encoding that a byte-order mark names (Encoding §6, "BOM sniff"). */
function sniffByteOrderMark(bytes: Uint8Array): string | undefined {
  if (bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf) return "utf-8";
  if (bytes[0] === 0xfe && bytes[1] === 0xff) return "utf-16be";
  if (bytes[0] === 0xff && bytes[1] === 0xfe) return "utf-16le";
  return undefined;
}

/** Percent-encoded text as bytes (URL §1.3); what is no escape stands for itself. */
function percentDecode(text: string): Uint8Array<ArrayBuffer> {
  return latin1Bytes(text.replace(/%([0-9A-Fa-f]{2})/g, (_, hex) => String.fromCharCode(parseInt(hex, 16))));
}

/** Percent-encoded text, read as UTF-8 if that is what its bytes are, else in `fallback`. */
function percentDecodeText(text: string, fallback: string): string {
  if (isPlain(text)) return text;
  const bytes = percentDecode(text);
  return decodeText(bytes, utf8OrInForce(bytes, fallback));
}

/** Whether text from the wire needs no decoding: it is ASCII, and nothing in it is percent-encoded. */
function isPlain(text: string): boolean {
  return !/[%\x80-\xff]/.test(text);
}

// ── Detection ────────────────────────────────────────────────────────────────────────────────────
// What are these bytes, and what garbled this text? One model answers both. It says how ordinary a text is, in bits,
// as a compressor would: letters that often follow one another cost few, strange neighbours many. Bytes are read in
// each encoding that they may be in, and the reading that costs least is the likeliest. To undo a mix-up, a text is
// encoded as it was read, and then the question is the same: what are these bytes?
//
// An encoding is made for certain languages, and a reading is measured by those alone: that Chinese read as
// windows-1251 is all letters helps little, if no language of windows-1251 puts them in such an order.

/**
 * What is ordinary in a language: some of its words, the commonest first. Which letters follow which is learnt from
 * them. `xx` and `xc` are for the letters of other languages, `hw` is half-width Japanese.
 */
const words = lazily(() =>
  table(`
  en: the of and to in is that it was for on are with as at be this have from or by not but what all were we when your
    can said there use an each which she do how their if will up other about out many then them these so some her would
    make like him into time has look two more go see way could people my than first water been who its now find long
    down day did get come made may part over new sound take only little work know place year live back
  fr: la le les des en que pour au sont été être à théâtre bientôt où déjà français première années mère élève école
    café ça chez avoir vingt dès côté île système préparé mais comme tout fait deux l'été garçon goût noël cœur
  de: der die und den von für ist nicht als aus dass bei über einen zwei ganz jetzt quelle xylophon zum sein können
    größe schön früher später wäre hätte möchte fünf natürlich gehört für größer müller träume heißt mädchen menschen
  es: de la el y los del con una para al más sus 1.º entre todo esta ser mejor viaje dos había era años qué cómo día
    después aquí información población región niño señor año mañana política canción corazón número público tenía
  pt: de a do da para não as dos das câmara decisões condições nº opinião já fazer trabalho entre quem me são região
    então mão pão coração ação situação política água família história público ninguém será vocês têm avô lição às
  it: di la il una è sono del come menù alla più lo azione informazione senza prezzo pagina questa pubblico delle ci
    perché può città però sarà attività giù martedì verità possibilità età tutto essere stato fatto anni prima dopo
  nl: de van het een en is dat op te zijn met voor aan er als maar bij uit worden was nog heeft ik kan meer deze geen
    veel hebben één geïnteresseerd coördinatie reünie zoëven ideeën België Italië financiële patiënten vóór café hè
  sv: och att det på är för till den inte ett var sig från kan när säger under där vid skulle kommer vara hade alla
    mycket må göra även två små många människor första största själv hända fråga låt åka öppna räcka dörr år åt län
  da: at det en til på den for har ikke han vi så først idé siger også eller sin ved værktøj lærer nær skal ville
    kommer ud får andre over må gøre små mange mennesker første spørgsmål gå dør køb søndag læse både før hørt nød øst
  no: og det på en til å av for ikke den har jeg kan etter eller nå sin hvor skal ville kommer ut være mye over da må
    gjøre små mange mennesker første største gå rekke dør kjøp søndag måned træ sette lese både før hørt nød øst
  fi: ja oli mutta kun kuin sen joka tai vain mitä olla vielä tämä mukaan jälkeen kanssa sekä siitä tässä pitää päivä
    vuoden kaikki yksi työ isä kesä käyttää tehdä lähtee tänään elämä pääsi näkyy löytyy työtä yö syödä häntä että
  is: og í á það ekki um en fyrir frá hún eða þetta verið sér þú eftir ár maður daginn mjög stilla opna bæta landið
    góðan já líka aðeins öll því hvað hæð ætla nýja tíma stað austur vestur ágúst október blaðið börnin skóli þýska
  pl: na się jest od za przez czy są ich określa wartość plików tym już było jego który koniec dnia pan można więc
    sobie dzień życie człowiek wszystko między święta źródło każdy właśnie mieć pięć miłość polski głowa ludzi żeby ją
  cs: že pro za si od jsem který název nastavení žádné šířka zařízení ťuk ďábel ó jeho při však před být má může více
    není člověk město práce řekl století průběhu společnost české děkuji příliš kůň úřad něco někdy žádný většina
  sk: na že za ktoré už veľkosť názov dĺžka ó číslo sú alebo jeho pri až ľudí učiteľ stratiť byť má viac tiež podľa
    prvý nie rok človek práca povedal storočia slovenské ďakujem príliš kôň úrad niečo väčšina všetko vyhľadať môj
  hu: a és hogy csak már volt ha még én ki minden be más amely után lesz nagyon két által ezt között új jó lett arra
    ember év alatt később például születik működés szükség felé kívül fő erdő nyílt összes közül végül rendszer
  ro: de și în care se pentru fi prin dreptul libertate egală lui minunată casă toată cele între până această când fără
    însă mâine țară știu viață același bună ziua mulțumesc în ţară oraşul încă cărți copiii română știința câte
  hr: na da za su što bi ili koje sadržaj veličina mogućnost općina članak područje sječanj pisač već uređeni postaviti
    kako sve prema ima prije jer godine rekao između već ništa kuća nešto želja što čitati njegov ljudi vrijeme
  sl: je v za po ali iz že možnost način število področje pravice pravičen člen širina ključ ni tako kako ko med pred
    bila samo če biti sem ima vse dan človek življenje reči hiša nekaj želja čas žena drugi prišel čez brez leto
  tr: ve bir için ile mi olduğu sağlık şahıs hakkı öğrenim çalışma tarafından göre bunu üzerinde akşam kadın okul
    yalnız yaptı karşı ürün yıl bütün önce dünya değişik öğretmen ağaç güneş diye nasıl yarın sıra altı etmiş ağır yüz
  lt: iš už dar teisę vertė šrifto naują apsaugą prie vakaras rytas namų kelias mokykla galėjo turėjo įvairių pačią
    žinoma dėl iki metų jei būti mes žmonių žmogus kai ką lietuvos vėl pačių gerą būdas žodis švietimo ąžuolas įmonė
  lv: un par kā viņš pēc tiesības izmērs vērtība čaks līdzeklis brīvība tautu tikai šodien rīts mājas grāmata draugs
    skolā varēja naudu kādēļ nākamā vēl cilvēks tās šajā viņa tāpēc rīgā jābūt mājās paldies ģimene ķēde žurnāls
  et: on ka kui mis ning selle või mida õigus võimalik töötab õige žanr šokolaad väärtus pärast just jõudma peale
    kõrval lähed ülikool raamat ühe jäi õpetaja nende juba aasta mees öelda mõte küsimus õhtu süda teie palun eesti
  vi: và của có được một không người với các những này đã để đến từ ở thì nhiều năm vào tôi cũng sẽ dụng gần đặt rằng
    chức bổ hỗ câu lập trí cửa vùng lại phải đó rất trên còn nhà chị xin ơn chúng việc sống trước theo mọi quyền tự
  ru: и не на как но у за для его цена форма вы они или ещё уже только когда есть быть может чем время после при них
    человек год под этот себя который люди через первый привет спасибо сейчас больше другой дом работа объект москва
  uk: і не на що у до за від але для був про все форма ціна вони тільки коли бути дуже час після при людина рік день
    того можна себе який через життя перший привіт дякую зараз більше робота україни своїх ґанок тобі має між об'єкт
  bg: на да се за не че като това или но които цена фирма юни при има след беше те му ни аз още където много време
    година човек един хора живот първи здравей благодаря сега повече работа българия също така със която въпрос между
  sr: у је да на за су од који или није центар срце филм по већ само без све те бити према има али пре када након која
    године дан човек рекао између живот реч ништа кућа нешто жеља читати жена његов други време љубав њих међу џеп
  be: ў на не што у за для форма яны ёсць або яшчэ толькі калі вельмі час пры чалавек год дзень пад гэты таго можна
    сябе людзі праз жыццё першы тут прывітанне дзякуй зараз іншы праца беларусі мае каб іх свае слова таксама былі
  el: και του της για είναι στο δεν τον στην βράδυ ψυχή φορά έξω ανθρώπου τους μας παιδί μικρός μεγάλη χειμώνας ήθελε
    δουλειά θέση σελίδα προϊόντα επικοινωνία έχει κατά πολύ πρέπει όταν μόνο ημέρα ευχαριστώ κάθε σπίτι ζωή κόσμος
  he: את על הוא גם יותר כל מה היה צריך סוף קטן לאחר כמו לפני אין ברכת פתח ספרים אמר היתה לפי עצמו שבת ערב בוקר מים
    מדינה חברה גדול חזרה ועוד להגיד זכות חופש להיות הזה שלי עוד בית איש שנה שנים בו לו הם אנחנו ראשון דבר ארץ עבודה
  ar: في إلى عن مع التي هذه كان أو وزير شخص رئيس مؤسسة نظام آخر لم عند لماذا حق حرية المدينة الرجل المرأة القديمة صفحة
    هاتف سيارة قبل تحت طعام وقد إن قال اليوم غير بعض عليه أكثر الناس الدول العربية بيت كتاب ماء وفي الأول جدا يكون
  fa: و به از که این است برای می خود کرد شده ما عنوان قرار حال صفحه طور نظر موضوع غیر ثبت بزرگ دارد راه حقوق آزادي
    مي‌کند هستند داشت گفتم ديروز فردا باید سال پیش چه همه ایران نیست دیگر تو بسیار سلام خانه مادر زندگی گذشته جهان پنج
  ur: کے کی میں ہے کا اور سے کو یہ نہیں اس جو ان حق خوش آپ حکومت صدر عالم نظر غلط ضرور ذکر اصل فرق تو تھی کیا گیا لیے
    ہی ہوئے جا اپنے بعد اب پاکستان دن سال سلام شکریہ شہر پانی بچے ہوں دو بات وقت کام زبان ٹھیک چاہیے بڑا ڈر ملک دیا
  th: ที่ การ เป็น และ มี ไม่ ได้ ให้ จะ ความ หรือ ต้อง โดย สิทธิ์ ฟัง รัฐ กฎ ๆ ปฏิบัติ ฉัน ฝน เสรีภาพ มนุษย์ ร้าน
    เพื่อน ชาย เล็ก ใหญ่ ติดต่อ จำกัด ซึ่ง ถึง แล้ว เรา ขึ้น ทำ ประเทศ ครับ ขอบคุณ บ้าน ทุก อย่าง ผู้ สามารถ กลับ ชื่อ
  xx: tōkyō ōsaka kyōto nǐ hǎo zhōngguó běijīng mā má mǎ lǜ ĉu ĝi ŝi ĵaŭdo ĥoro ŵy ŷd ħobż ġuże ċavetta azərbaycan
    hawaiʻi māori ẹ̀kọ́ ọjọ́ ṣe
  xc: қазақстан тілі және үшін өте ғылым ўзбек қилиб ҳам үчүн болуп әһәт яңа һәм тоҷик ҷумҳурӣ жөнінде
  hw: ﾉ ﾆ ﾊ ｦ ｶﾞ ﾃﾞｽ ﾏｽ ﾆﾎﾝ ﾄｳｷｮｳ ｶﾌﾞｼｷｶﾞｲｼｬ ﾃﾞｰﾀ ﾌｧｲﾙ ﾒﾆｭｰ ｼｽﾃﾑ ｻｰﾋﾞｽ ﾍﾟｰｼﾞ ﾃｽﾄ ﾊﾝｶｸ ｶﾅ ﾅﾏｴ ｼﾞｭｳｼｮ ﾃﾞﾝﾜ ﾊﾞﾝｺﾞｳ ﾀﾅｶ ｻﾄｳ
    ｽｽﾞｷ ﾔﾏﾀﾞ ﾀﾛｳ ﾊﾅｺ ｵｵｻｶ ｷｮｳﾄ ｷﾞﾝｺｳ ﾌﾘｺﾐ ｺｳｻﾞ ﾌﾂｳ ｾｲｷｭｳ ﾈﾝｶﾞｯﾋﾟ ｻﾞｲｺ ｼｮｳﾋﾝ ｱﾄﾞﾚｽ ｴﾗｰ ﾕｰｻﾞｰ ﾈｯﾄﾜｰｸ ﾎｰﾑ ﾃﾚﾋﾞ ﾗｼﾞｵ ﾒｰﾙ
    ﾜﾀｼ ﾖﾛｼｸ ｵﾈｶﾞｲ ｲﾀｼﾏｽ ｱﾘｶﾞﾄｳ ﾓ ﾍ ﾖﾘ ﾐｷ ﾑﾗ ﾇﾉ ﾁﾊﾞ ﾋﾛｼ ﾚｲ ﾙｰﾙ ﾖﾃｲ ﾘｭｳ ﾔｻｲ ﾕｷ ｪ ｨ ｩ ｫ
`)
);

/** The commonest characters of the languages that have many, in order. */
const characters = lazily(() =>
  table(`
  zh: 的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意
    无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入
    几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边
    死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运欢迎请谢站页网店版您首爱宋早友片图火车七八九千六孩晚送飞吃喝喜跑快慢读写画城村街红绿蓝黄衣服药医病票钱银商酒茶饭菜米肉鱼牛羊狗猫鸟花草树木林雨雪风冷热春夏
    秋冬昨晨午夜钟秒星周末假节礼玩笑哭唱歌舞影视脑络游戏软密码登录注册搜索载附近列频留言评标返双云客离房府石河湖岛江际研究组织消息态护价值质低层优整段温找包布团推故参精级增显食转造养曾装岁黑夫怎买卖爸妈弟妹姐哥娘男朋
    亲永远幸福健康希努习惯简单复杂容易困需改善择试验考检查修助帮忙差错误忘忆丢失钥匙锁铁桥厂纸笔墨章句词语音乐诗剧字典史承状环境污染源技具材料支持续突破尽虽否仅另尤甚既般宗育律警察官兵士武器静睡醒梦床桌椅灯窗墙角楼室
    厅厨洗浴板顾售订货付款账户印签联址邮箱
  tw: 的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡用道行所然家種事成方多經麼去法學如都同現當沒動面起看定天分還進好小部其些主樣理心她本前開但因只從想實日軍者意
    無力它與長把機十民第公此已工使情明性知全三又關點正業外將兩高間由問很最重並物手應戰向頭文體政美相見被利什二等產或新己制身果加西斯月話合回特代內信表化老給世位次度門任常先海通教兒原東聲提立及比員解水名真論處走義各入
    幾口認條平系氣題活爾更別打女變四神總何電數安少報才結反受目太量再感建務做接必場件計管期市直德資命山金指克許統區保至隊形社便空決治展馬科司五基眼書非則聽白卻界達光放強即像難且權思王象完設式色路記南品住告類求據程北邊
    死張該交規萬取拉格望覺術領共確傳師觀清今切院讓識候帶導爭運歡迎請謝站頁網店版您首香港台灣係唔嘅咗佢早友片圖火車七八九千六孩晚送飛吃喝喜跑快慢讀寫畫城村街紅綠藍黃衣服藥醫病票錢銀商酒茶飯菜米肉魚牛羊狗貓鳥花草樹木林
    雨雪風冷熱春夏秋冬昨晨午夜鐘秒星週末假節禮玩笑哭唱歌舞影視腦絡遊戲軟密碼登錄註冊搜尋載附近列頻留言評標返雙雲客離房府石河湖島江際研究組織消息態護價值質低層優整段溫找包布團推故參精級增顯食轉造養曾裝歲黑夫怎買賣爸媽
    弟妹姐哥娘男朋親愛永遠幸福健康希努習慣簡單複雜容易困需改善擇試驗考檢查修助幫忙差錯誤忘憶丟失鑰匙鎖鐵橋廠紙筆墨章句詞語音樂詩劇字典史承狀環境污染源技具材料支持續突破盡雖否僅另尤甚既般宗育律警察官兵士武器靜睡醒夢床
    桌椅燈窗牆角樓室廳廚洗浴闆顧售訂貨付款帳戶印簽聯址郵箱貼臺嗎吧呢啦喔
  ja: のにはをたがでてとしれさいあるっなかりこもそらうくまよきせけんえつみわめおやちすろほどだべげごじばぶぎずびねむぼひふへぐゃゅょぬぱぽ。、ー日一国会人年大十二本中出三時行見月分後前生五間上東四今金九入学高円子外
    八六下来気小七山話女北午百先名川千水半男西電校語土木聞食車何南万毎白天母火右読友左休父雨事自社者地業方新場員立開手力問代明動京目通言理田主題意不作用度強公持野以思家世多正安院心界教文元重近考画海売知道集別物使品計
    死特私始朝運終台広住無真有口少町料工建空急止送転春夏秋冬店屋花茶写真夜飯飲帰着買書楽好早歌駅親切体音色赤青黒走犬鳥魚肉銀病旅洋服待経現最表議民連対部合市内相定回選米実関決全戦発最調化当約首法性要制治成期取都和平加
    受県続進設保改記初指権支産点報済活原共得解交資予向際勝面告反判認参利組信在件団側任引求所次昨論官増感情投示変打直両式確村提案及由条第又等他基育並同為罪宗差享週曜遊隣飼猫鍵閉暗雪嵐寒暖涼暑霧湖王様姫祖孫兄弟姉妹娘息
    夫妻僕俺君彼誰処奥頃翌晩昼夕寝起床窓扉庭池橋港船飛列乗降歩泳笑泣怒喜悲恋愛忘覚返去若古遅弱深浅狭丸角形線石砂岩星雲雷葉枝根種果菜豆卵塩糖酒杯皿箱袋紙筆絵描曲踊映像章巻号欄覧索録登載更掲板検込払購価格銭貸借働客
  ko: 이다는의에을가고하지은로한기도어사나인대리자들아를그수시라있서정보해게일으부스만면장주원과전구상제여니것우관공조비마학생음소동성안중세내방모용국신화문습년무오분등당했유실경계요와물때말없까않았던선영더물회어저
    려발두입행명간같적거치진야러드트레최불미재된단후위산바개되할교연물본차집속통제번설업날심린결노민현박길름럼님양군변식작평력출금토술백료천달감피타강건람야험합반배혀져였겠습니까안녕세요감사합니다권든또받며법호및누종
    런언존떠느포예별초격록필증활완함른질준체따류터근될직견매벌추히범운표파크버쪽열태색뉴너래능향데참블형줄글볼벗닫왜눈밭놀웃키많읽난옆늘밖춥쓰봄꽃밤께싶죽먹걸쉽값싸골책돈맛밥병약손머귀코옷곳앞뒤겉왼높낮깊넓좁빠늦젊늙
    혼혹캐카루르티메홈페뮤림
`)
);

/** Rows `key: text`. */
function table(rows: string): ReadonlyMap<string, string> {
  const matches = rows.matchAll(/(\w+): ([^:]+?)\s+(?=$|\w+:)/g);
  return new Map(Array.from(matches, ([, key = "", text = ""]) => [key, text.replace(/\s+/g, " ")]));
}

/** Bits for the other characters, by the rows of the charset where they are: "level 2" first, which is rarer. */
const LEVELS: ReadonlyMap<string, readonly (readonly [string, first: number, last: number, bits: number])[]> = new Map([
  ["zh", [["gbk", 0xd8, 0xf7, 18], ["gbk", 0xb0, 0xd7, 14]]],
  ["tw", [["big5", 0xc9, 0xf9, 18], ["big5", 0xa4, 0xc6, 14]]],
  ["ja", [["euc-jp", 0xd0, 0xf4, 18], ["euc-jp", 0xb0, 0xcf, 14.5], ["euc-jp", 0xa4, 0xa4, 10], [
    "euc-jp",
    0xa5,
    0xa5,
    8,
  ]]],
  ["ko", [["euc-kr", 0xca, 0xfd, 18], ["euc-kr", 0xb0, 0xc8, 14]]],
]);

/** An encoding that text may be in. */
interface Candidate {
  readonly encoding: string;
  /** The part of the world where it is used. */
  readonly region: number;
  /** Bits for being seldom used. */
  readonly rarity: number;
  readonly languages: () => readonly Language[];
}

/** Part after part of the world, each encoding with its rarity and its languages. */
const ownCandidates = lazily(() =>
  candidates(`
  utf-8 0 ${[...words().keys(), ...characters().keys()].join(" ")}
  windows-1252 0 en fr de es pt it nl sv da no fi is
    iso-8859-15 3 en fr de es pt it nl sv da no fi is; macintosh 8 en fr de es pt it nl sv da no fi is
  gbk 0 zh en; big5 0 tw en; shift_jis 0 ja hw en; euc-jp 1 ja hw en; euc-kr 0 ko en
  windows-1251 0 ru uk bg sr be en; koi8-r 2 ru en; koi8-u 4 uk ru en; ibm866 3 ru be en
    iso-8859-5 4 ru uk bg sr be en; x-mac-cyrillic 7 ru uk bg en
  windows-1250 1 pl cs sk hu ro hr sl de en; iso-8859-2 2 pl cs sk hu ro hr sl de en
  windows-1253 1 el en; iso-8859-7 1.5 el en
  windows-1254 1 tr en
  windows-1255 2 he en; iso-8859-8 5 he en
  windows-1256 2 ar fa ur en fr; iso-8859-6 5 ar en
  windows-1257 1 lt lv et en
  windows-1258 3 vi en
  windows-874 2 th en`)
);

function candidates(rows: string): readonly Candidate[] {
  return rows.trim().split(/\n(?! {4})/).flatMap((line, region) =>
    line.split(/[;\n]/).map((row) => {
      const [encoding = "", rarity, ...codes] = row.trim().split(" ");
      return { encoding, region, rarity: Number(rarity), languages: lazily(() => codes.map(language)) };
    })
  );
}

const everyLanguage = () => ownCandidates()[0]!.languages();

/** One way to read bytes. */
interface Reading {
  readonly encoding: string;
  /** What the bytes looked at read as. */
  readonly text: string;
  /** What that costs: the fewer, the more ordinary. */
  readonly bits: number;
}

/** Bits by which a reading must be ahead of every other one that differs, for its encoding to be taken as known. */
const SURE_BITS = 8;
/** Bits for a character cut off. */
const CUT = 11;

/** How many bytes are looked at, how many of them in one run, and how many ASCII ones beside what is not. */
const SAMPLE = 1536, RUN = 512, BESIDE = 32;

/** What is known of bytes whose encoding is to be found. */
interface Expectations {
  /** Bits to take off for encodings that are expected here, such as those of the files beside this one. */
  readonly hints?: ReadonlyMap<string, number>;
  /** Whether the bytes go on: the last character may be cut off. */
  readonly partial?: boolean;
  /** The names of the encodings to choose from. */
  readonly among?: readonly string[];
  /** Readings that cost so many bits more than the best one need not be told apart: their bits are Infinity. */
  readonly slack?: number;
}

/** The encodings that bytes may be in, likeliest first; none for ASCII, which is the same in all. */
function detect(bytes: Uint8Array, expectations: Expectations = {}): Reading[] {
  const { hints, partial = false, among, slack = Infinity } = expectations;
  const seen = among === undefined ? sniffUtf16(bytes) ?? sniffIso2022Jp(bytes) : undefined;
  if (seen !== undefined) return [{ encoding: seen, text: decodeReading(bytes.subarray(0, SAMPLE), seen), bits: 0 }];
  const sample = tellingBytes(bytes), isUtf8 = isMostlyUtf8(sample, partial);
  if (sample.length === 0) return [];
  // Of a long run only the beginning is looked at, which may cut a character.
  const canCut = partial || sample.length > RUN, hintOf = (encoding: string) => hints?.get(encoding) ?? 0;
  const candidates = (among?.map(candidateOf) ?? ownCandidates()).filter(({ encoding }) =>
    encoding !== "utf-8" || isUtf8
  ).sort((a, b) => hintOf(b.encoding) - hintOf(a.encoding));
  let least = Infinity;
  const readings = candidates.map(({ encoding, rarity, languages }): Reading => {
    const whole = decodeReading(sample, encoding);
    const text = canCut && isWide(encoding) ? whole.replace(/\ufffd{1,3}(?=\n)/g, "") : whole;
    const ownBits = (whole.length - text.length) * CUT + rarity - hintOf(encoding);
    const bits = ownBits + bitsOf(text, languages(), least + slack - ownBits);
    least = Math.min(least, bits);
    return { encoding, text, bits };
  });
  return readings.sort((a, b) => a.bits - b.bits);
}

/**
 * What bytes themselves say of their encoding: a byte-order mark, a declaration, the zeros of UTF-16, the escape
 * sequences of ISO-2022-JP, or that they are UTF-8, though a few may be damaged.
 */
function evidentEncoding(bytes: Uint8Array, type: string, partial = false): string | undefined {
  return sniffByteOrderMark(bytes) ?? declaredEncoding(bytes, type) ?? sniffUtf16(bytes) ?? sniffIso2022Jp(bytes) ??
    (isMostlyUtf8(bytes, partial) ? "utf-8" : undefined);
}

/** Bits that text may cost in the encoding that it is in: a little, and so much a character. */
const READABLE_BITS = 32, CHARACTER_BITS = 11;

/** What bytes are in, and whether that is sure: what they say of themselves, else what they read best in. */
function encodingOfBytes(
  bytes: Uint8Array,
  type: string,
  hints: ReadonlyMap<string, number>,
  partial = false,
): Pick<Nature, "encoding" | "isSure"> {
  const evident = evidentEncoding(bytes, type, partial);
  return evident === undefined ? detectedEncoding(bytes, hints, partial) : { encoding: evident, isSure: true };
}

/** The encoding in which bytes read as the most ordinary text, if that is text at all. */
function detectedEncoding(
  bytes: Uint8Array,
  hints: ReadonlyMap<string, number>,
  partial: boolean,
): Pick<Nature, "encoding" | "isSure"> {
  const readings = detect(bytes, { hints, partial, slack: SURE_BITS }), [best] = readings;
  const isText = best !== undefined && best.bits <= READABLE_BITS + CHARACTER_BITS * best.text.length;
  if (!isText) return { encoding: undefined, isSure: false };
  return { encoding: best.encoding, isSure: isSure(readings) };
}

/** What bytes of a request are in: UTF-8 if that is what they look like, else the charset in force. */
function utf8OrInForce(bytes: Uint8Array, charset: string): string {
  return isValid(bytes, "utf-8") && isLikelierUtf8(bytes, charset) ? "utf-8" : charset;
}

/** Bits that speak for the charset in force, where bytes can be read in two. */
const IN_FORCE_BITS = 12;

/** Whether bytes that may be UTF-8 are more ordinary text so than in the charset in force: `%C4%A3` is `模` in GBK, not `ģ`. */
function isLikelierUtf8(bytes: Uint8Array, charset: string): boolean {
  if (!bytes.some((byte) => byte > 0x7f)) return true;
  if (charset.startsWith("utf-") || !isValid(bytes, charset)) return true;
  const [best] = detect(bytes, {
    hints: new Map([[charset, IN_FORCE_BITS]]),
    among: ["utf-8", charset],
  });
  return best === undefined || best.encoding === "utf-8";
}

function candidateOf(encoding: string): Candidate {
  const other = { encoding, region: -1, rarity: 5, languages: everyLanguage };
  return ownCandidates().find((candidate) => candidate.encoding === encoding) ?? other;
}

/** Whether the first reading is clearly better than all that differ from it. */
function isSure([first, ...others]: readonly Reading[]): boolean {
  if (first === undefined) return false;
  const next = others.find(({ text }) => text !== first.text);
  return next === undefined || next.bits - first.bits >= SURE_BITS;
}

const isWide = (encoding: string) => isMultiByte(encoding) || encoding.startsWith("utf-");

/** The bytes that say something: what is not ASCII and a little around it, from all over, a line for each run. */
function tellingBytes(bytes: Uint8Array): Uint8Array {
  const runs = runsOf(bytes), sample = new Uint8Array(SAMPLE + RUN + 2 * BESIDE);
  const total = runs.reduce((sum, run) => sum + run.length + 1, 0), step = Math.max(1, total / SAMPLE);
  let length = 0;
  for (let i = 0; i < runs.length && length < SAMPLE; i += step) {
    const run = runs[Math.trunc(i)]!;
    sample.set(run, length);
    // At a line feed, every decoder begins anew.
    sample[(length += run.length + 1) - 1] = 0x0a;
  }
  return sample.subarray(0, length);
}

function runsOf(bytes: Uint8Array): Uint8Array[] {
  const runs: Uint8Array[] = [];
  for (let free = 0, first; (first = skipAscii(bytes, free)) < bytes.length;) {
    const limit = Math.min(bytes.length, first + RUN);
    let last = first, at = first;
    for (; at < limit && at <= last + 2 * BESIDE; at++) if (bytes[at]! > 0x7f) last = at;
    const start = Math.max(first - BESIDE, free);
    free = Math.min(last + 1 + BESIDE, limit);
    runs.push(bytes.subarray(start, free));
    // After a run that was cut, the next one begins where no character can be: no trail byte is below 30.
    if (at === limit) { while (free < bytes.length && bytes[free]! >= 0x30) free++; }
  }
  return runs;
}

function skipAscii(bytes: Uint8Array, at: number): number {
  while (at < bytes.length && bytes[at]! <= 0x7f) at++;
  return at;
}

/** UTF-16 without a mark shows by the zero bytes of its ASCII, which stand on one side; what is no text does not. */
function sniffUtf16(bytes: Uint8Array): "utf-16le" | "utf-16be" | undefined {
  const head = bytes.subarray(0, SAMPLE), zeros: [even: number, odd: number] = [0, 0];
  for (let i = 0; i < head.length; i++) if (head[i] === 0) zeros[i & 1 ? 1 : 0]++;
  const most = Math.max(...zeros), encoding = most === zeros[1] ? "utf-16le" : "utf-16be";
  // A few may stand on the other side: U+4E00 has one, too.
  if (head.length % 2 !== 0 || Math.min(...zeros) * 3 >= most) return undefined;
  const text = decodeReading(head, encoding).slice(0, bytes.length > SAMPLE ? -1 : undefined);
  // deno-lint-ignore no-control-regex
  const isText = !/[\p{Cn}\p{Co}\ufffd\0-\x08\x0e-\x1f\x7f-\x9f]/u.test(text);
  return isText && bitsOf(text, everyLanguage()) < 11 * text.length + 16 ? encoding : undefined;
}

/** ISO-2022-JP is seven bits, and says what it is by its escape sequences (Encoding §12.2). */
function sniffIso2022Jp(bytes: Uint8Array): "iso-2022-jp" | undefined {
  if (!bytes.includes(0x1b)) return undefined;
  const text = latin1(bytes.subarray(0, 0x10000));
  // deno-lint-ignore no-control-regex
  const isEscaped = /\x1b(?:\$[@B]|\([JI])/.test(text) && !/[\x80-\xff]/.test(text);
  // An escape sequence may be cut off at the end.
  const last = bytes.lastIndexOf(0x1b), whole = last < bytes.length - 2 ? bytes : bytes.subarray(0, last);
  return isEscaped && !/\ufffd./s.test(decodeReading(whole, "iso-2022-jp")) ? "iso-2022-jp" : undefined;
}

/** Whether bytes are ASCII, UTF-8, or damaged UTF-8: nine tenths of those beyond ASCII stand in well-formed sequences. */
function isMostlyUtf8(bytes: Uint8Array, partial = false): boolean {
  let good = 0, bad = 0;
  for (let i = 0, end = 0; i < bytes.length; i = end) {
    const lead = bytes[i]!,
      length = lead < 0x80 ? 1 : lead < 0xc2 || lead > 0xf4 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    for (end = i + 1; end < i + length && (bytes[end]! & 0xc0) === 0x80;) end++;
    if (length === 1) continue;
    if (end === i + length || partial && length > 0 && end === bytes.length) good += end - i;
    else bad += end - i;
  }
  return bad * 9 <= good;
}

const DECODERS = new Map<string, TextDecoder>();

/** How bytes read, to measure that: as the platform decodes them, or DOS; a byte-order mark stays. */
function decodeReading(bytes: Uint8Array, encoding: string): string {
  const dos = DOS.get(encoding);
  if (dos !== undefined) return latin1(bytes).replace(/[\x80-\xff]/g, (byte) => dos[byte.charCodeAt(0) - 0x80]!);
  const decoder = DECODERS.get(encoding) ?? new TextDecoder(encoding, { ignoreBOM: true });
  DECODERS.set(encoding, decoder);
  const text = decoder.decode(bytes);
  // What windows-1258 writes as a letter and a mark is one letter in its language.
  return encoding === "windows-1258" ? text.normalize("NFC") : text;
}

// What a text costs.

/** Bits are counted in eighths, so that a byte holds them. */
const BIT = 8;
/**
 * Bits for a letter that the language lacks, for one that no language has, for a character of another script, for going
 * on in another language, for the same sign again (a rule of hyphens), and for the same character again.
 */
const FOREIGN = 15, UNKNOWN = 12, STRANGE = 22, SWITCH = 9, REPEATED = 2, DOUBLED = 4;
/** How much a pair of letters owes to how common the second is, in pairs counted. */
const SMOOTHING = 20;
/** More than the letters of all words. */
const LETTERS = 1024;

/** What a language expects. */
interface Language {
  /** Its letters by their number: 0 for none, which is the edge of a word; 1 for one of another language. */
  readonly alphabet: Uint8Array;
  readonly size: number;
  /** The bits of a letter after another: a row for each letter before. */
  readonly pairs: Uint8Array;
  /** The bits of characters that are no letters, by code unit. */
  readonly characters: Uint8Array | undefined;
}

const LANGUAGES = new Map<string, Language>();

function language(code: string): Language {
  const language = LANGUAGES.get(code) ?? learn(code);
  LANGUAGES.set(code, language);
  return language;
}

/** The letters of all words, numbered from 1, by code unit; a capital has the number of its small letter. */
const letters = lazily(() => {
  const numbers = new Uint16Array(0x10000);
  [...new Set([...words().values()].join("").replace(/[^\p{L}\p{M}]/gu, ""))].forEach((letter, i) => {
    for (const form of [letter.toUpperCase(), letter]) if (form.length === 1) numbers[form.charCodeAt(0)] ||= i + 1;
  });
  numbers["İ".charCodeAt(0)] = numbers["i".charCodeAt(0)]!;
  return numbers;
});

/** Learns from the words of a language what letters it puts after one another; some English is written in all. */
function learn(code: string): Language {
  const english = words().get("en")!, own = words().get(code) ?? english, alphabet = new Uint8Array(LETTERS).fill(1);
  const used = new Set(Array.from(own + english, (letter) => letters()[letter.charCodeAt(0)]!).filter((n) => n > 0));
  alphabet[0] = 0;
  [...used].forEach((number, i) => alphabet[number] = i + 2);
  const size = used.size + 2, counts = new Float64Array(size * size);
  const count = (words: string, weight: number) =>
    words.split(" ").forEach((word, rank) => {
      let before = 0;
      for (const letter of `${word} `) {
        const now = alphabet[letters()[letter.charCodeAt(0)]!]!;
        counts[before * size + now]! += weight / (rank + 20);
        before = now;
      }
    });
  count(own, 40);
  if (own !== english) count(english, 3);
  return { alphabet, size, pairs: pairBits(counts, size), characters: characterBits(code) };
}

/** A pair costs by how rare it is in the words; one that is not there, by how rare its second letter is. */
function pairBits(counts: Float64Array, size: number): Uint8Array {
  const firsts = new Float64Array(size), seconds = new Float64Array(size), pairs = new Uint8Array(size * size);
  counts.forEach((count, pair) => (firsts[Math.trunc(pair / size)]! += count, seconds[pair % size]! += count));
  const total = seconds.reduce((a, b) => a + b);
  counts.forEach((count, pair) => {
    const first = firsts[Math.trunc(pair / size)]!, second = pair % size;
    const expected = (seconds[second]! + 0.5) / (total + 0.5 * size);
    const bits = -Math.log2((count + SMOOTHING * expected) / (first + SMOOTHING));
    pairs[pair] = pair === 0 ? 0 : (second === 1 ? FOREIGN : bits) * BIT;
  });
  return pairs;
}

/** Characters cost by their place in the list, others by their level. */
function characterBits(code: string): Uint8Array | undefined {
  const common = characters().get(code), bits = new Uint8Array(0x10000).fill(19 * BIT);
  if (common === undefined) return undefined;
  for (const [encoding, first, last, level] of LEVELS.get(code)!) {
    const codes = numbers(first, last).flatMap((row) => numbers(0xa1, 0xfe).flatMap((column) => [row, column]));
    // Big5 has two more half rows.
    if (encoding === "big5") {
      codes.push(...numbers(first, last).flatMap((row) => numbers(0x40, 0x7e).flatMap((column) => [row, column])));
    }
    for (const character of decodeText(Uint8Array.from(codes), encoding)) bits[character.charCodeAt(0)] = level * BIT;
  }
  [...common].forEach((character, rank) => bits[character.charCodeAt(0)] = (4.2 + 0.74 * Math.log2(1 + rank)) * BIT);
  return bits;
}

/**
 * Kinds of characters: white Space, Punctuation, Digits, Lower case, Upper case, Capitals (upper case after another),
 * letters without case (E), Marks, Han, Katakana, hiRagana, hanGul, Wide punctuation, sIgns, Boxes, Junk.
 */
const KINDS = "SPDLUCEMHKRGWIBJ", SPACE = 1, UPPER = 5, CAPITALS = 6, MARK = 8, JUNK = 16;
const isLetter = (kind: number) => kind >= 4 && kind <= 8, isCharacter = (kind: number) => kind >= 9 && kind <= 12;

/** The first row that matches a code unit gives its kind, and its bits but for letters. */
// deno-fmt-ignore
const unitKinds = lazily((): readonly (readonly [kind: string, bits: number, units: RegExp])[] => [
  ["S", 1.5, /[ \n\r\t]/], ["S", 5, /[\xa0\u3000]/], ["S", 0, /\ufeff/],
  ["D", 3.3, /\d/], ["D", 5, /[¹²³]/],
  ["P", 4, /[.,:;?!'"()\/_-]/], ["P", 5, /’/], ["P", 6, /[!-\/:-@\[-`{-~‘“”‚„…–—]/], ["P", 8, /[«»‹›]/],
  ["W", 3, /[。，、]/], ["W", 5, /[！？：；（）「」『』《》·【】]/], ["W", 7, /[\u3000-\u303f\uff01-\uff5e｡｢｣､･]/],
  ["I", 7, /[€£¥¢§©®°±×·¼½¾µ№•™†←-↓★☆○◎●■□◆◇▲△▼▽①-⑳≈≠≤≥√\ud83c-\ud83e]/], ["I", 3, /[\udc00-\udfff]/],
  ["B", 5, /[─│┌┐└┘├┤┬┴┼═║╔╗╚╝]/], ["B", 7, /[\u2500-\u259f]/],
  ["H", 0, /[\p{Script=Han}々〇]/u], ["K", 0, /[\u30a1-\u30fe]/], ["R", 0, /\p{Script=Hiragana}/u],
  ["G", 0, /\p{Script=Hangul}/u],
  ["J", 18, /\ufffd/], ["J", 20, /[\p{Co}\p{Cn}\p{Cc}\p{Cs}]/u],
  ["U", 0, /[\p{Lu}\p{Lt}]/u], ["L", 0, /[\p{Ll}ªº]/u], ["E", 0, /[\p{Lo}\p{Lm}\u0e30-\u0e4e]/u], ["M", 5, /\p{M}/u],
  ["I", 10, /[\p{S}\p{P}]/u], ["I", 12, /[^]/],
]);

/** Bits for one kind (a row) before another (a column), in the order of `KINDS`. */
const moves = lazily(() =>
  Uint8Array.from(
    `2331 2219 3331 4463
   1233 3329 3322 3473
   2214 4459 4444 3474
   2250 8999 9999 5684
   3341 2289 7778 5684
   2246 2199 7778 5684
   2259 9901 9999 5684
   2259 9902 9999 5684
   4448 6699 0419 2553
   4448 6699 3029 2553
   4448 6699 1309 2553
   1248 6699 6661 3553
   3334 3349 1112 1443
   3235 5559 4444 4244
   2336 6669 4444 4402
   3334 4449 4444 4442`.replace(/\s/g, ""),
    (bits) => Number(bits) * BIT,
  )
);

/** Kinds and bits by code unit, found when first met; a kind is its place in `KINDS` and one. */
const kinds = lazily(() => new Uint8Array(0x10000)), unitBits = lazily(() => new Uint8Array(0x10000));

function kindOfUnit(unit: number): number {
  const [kind, bits] = unitKinds().find(([, , units]) => units.test(String.fromCharCode(unit)))!;
  unitBits()[unit] = bits * BIT;
  return kinds()[unit] = KINDS.indexOf(kind) + 1;
}

/** What a text costs, if each of its words is in one of these languages; Infinity if that is beyond the limit. */
function bitsOf(text: string, languages: readonly Language[], limit = Infinity): number {
  const numbers = letters(), known = kinds(), bits = unitBits(), moved = moves();
  const costs = new Float64Array(languages.length);
  let common = 0, kindBefore = SPACE, letterBefore = 0, unitBefore = 0, least = 0;
  // A line feed behind the text ends its last word.
  for (let i = 0; i <= text.length; i++) {
    const unit = i < text.length ? text.charCodeAt(i) : 0x0a, letter = numbers[unit]!;
    const found = known[unit] || kindOfUnit(unit);
    const kind = found === UPPER && (kindBefore === UPPER || kindBefore === CAPITALS) ? CAPITALS : found;
    const isRepeated = unit === unitBefore && !isLetter(kind) && kind !== JUNK;
    common += isRepeated
      ? (isCharacter(kind) ? DOUBLED : REPEATED) * BIT
      : moved[(kindBefore - 1) * KINDS.length + kind - 1]! + bits[unit]!;
    if (kind === MARK && letter === 0) continue;
    // A word ends where letters do.
    if (!isLetter(kind) || isCharacter(kindBefore)) {
      if (letterBefore > 0) addLetter(costs, languages, letterBefore, 0);
      letterBefore = 0;
      least = changeLanguage(costs);
      if (common + least > limit * BIT) return Infinity;
    }
    if (isLetter(kind)) addLetter(costs, languages, letterBefore, letter || -1);
    else if (isCharacter(kind) && !isRepeated) addCharacter(costs, languages, unit);
    [kindBefore, letterBefore, unitBefore] = [kind, isLetter(kind) ? letter : 0, unit];
  }
  return (common + least) / BIT;
}

/** A letter costs by the one before it; 0 is the edge of a word, -1 a letter of no language here. */
function addLetter(costs: Float64Array, languages: readonly Language[], before: number, number: number): void {
  for (let i = 0; i < costs.length; i++) {
    const { alphabet, size, pairs } = languages[i]!;
    costs[i]! += number < 0 ? UNKNOWN * BIT : pairs[alphabet[before]! * size + alphabet[number]!]!;
  }
}

function addCharacter(costs: Float64Array, languages: readonly Language[], unit: number): void {
  for (let i = 0; i < costs.length; i++) costs[i]! += languages[i]!.characters?.[unit] ?? STRANGE * BIT;
}

/** A word may be in another language than the one before. Returns what the best costs. */
function changeLanguage(costs: Float64Array): number {
  let least = Infinity;
  for (const cost of costs) if (cost < least) least = cost;
  for (let i = 0; i < costs.length; i++) costs[i] = Math.min(costs[i]!, least + SWITCH * BIT);
  return least;
}

// What garbled a text.

/** One explanation of garbled text. */
interface Diagnosis {
  /** What was written as one thing and read as another; the last time first, since it is undone first. */
  readonly steps: readonly { readonly written: string; readonly read: string }[];
  /** The text recovered. */
  readonly text: string;
  /** Characters lost for good: U+FFFD in the recovered text. */
  readonly lost: number;
  /** What it is, where no mix-up was undone. */
  readonly note?: string;
}

/** An explanation under way, with what its steps cost, and with the text. */
interface Explanation extends Omit<Diagnosis, "lost" | "note"> {
  readonly stepBits: number;
  readonly bits: number;
}

/** How much of a text is looked at, in characters. */
const DIAGNOSED = 200;
/** Bits for a mix-up, for one across parts of the world, and for another one before it. */
const MIX_UP = 5, UNUSUAL = 7, AGAIN = 8;
/** Bits that an explanation must save, that it may cost more than the best, and that a character of it may cost. */
const MARGIN = 2, WORSE = 20, ORDINARY = 12;

/**
 * Finds what garbled a text, best explanation first; none if it looks fine as it is.
 * Looks at the first 200 characters. Never throws.
 */
function diagnose(garbled: string): Diagnosis[] {
  const characters = [...garbled.slice(0, DIAGNOSED * 2).toWellFormed()].slice(0, DIAGNOSED);
  const text = characters.join("").replace(/\ufffd{2,3}/g, "\ufffd"), composed = text.normalize("NFC");
  const asIs = bitsOf(composed, everyLanguage()), found = new Map<string, Explanation>();
  // A question mark may stand for a byte lost.
  const texts = new Set([text, text.replace(/(?<=\P{ASCII})\?/gu, "\ufffd")]);
  let beam = [...texts].map((text): Explanation => ({ text, steps: [], stepBits: 0, bits: asIs }));
  for (let round = 0; round < 2; round++) {
    const next = beam.flatMap((from) => undo(from, asIs)).sort((a, b) => a.bits - b.bits);
    for (const explanation of next) {
      const { text, bits, stepBits } = explanation, isOrdinary = bits - stepBits <= ORDINARY * text.length + 8;
      const isBetter = bits < (found.get(text)?.bits ?? asIs - MARGIN) && text !== composed;
      if (isOrdinary && isBetter) found.set(text, explanation);
    }
    beam = next.filter(({ text }) => countLost(text) === 0).slice(0, 4);
  }
  const sorted = [...found.values()].sort((a, b) => a.bits - b.bits);
  const likely = sorted.filter(({ bits }) => bits < sorted[0]!.bits + WORSE).slice(0, 8);
  return [...likely.map(({ steps, text }) => ({ steps, text, lost: countLost(text) })), ...otherThanMixUps(text)];
}

const countLost = (text: string) => text.split("\ufffd").length - 1;

/** Undoes each pair once, as long as that costs less than the limit. */
function undo(from: Explanation, limit: number): Explanation[] {
  const found = new Map<string, Explanation>(), again = from.steps.length > 0 ? AGAIN : 0;
  for (const [pieces, readers] of readersOf(from.text)) {
    for (const written of mixedUp()) {
      const read = readers.reduce((a, b) => mixUpBits(written, b) < mixUpBits(written, a) ? b : a);
      if (read === written) continue;
      const steps = [...from.steps, { written: written.encoding, read: read.encoding }];
      for (const { text, bits } of meanings(pieces, written)) {
        const stepBits = from.stepBits + again + mixUpBits(written, read) + bits,
          least = found.get(text)?.bits ?? limit;
        if (text === from.text || text === "" || stepBits >= least) continue;
        const cost = stepBits + bitsOf(text, written.languages(), least - stepBits);
        if (cost < least) found.set(text, { text, steps, stepBits, bits: cost });
      }
    }
  }
  return [...found.values()];
}

/** The encodings of DOS and of old zip archives, which the Encoding Standard lacks: their characters from 80 to FF. */
// deno-fmt-ignore
const DOS: ReadonlyMap<string, string> = new Map([
  ["cp437", "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\xa0"],
  ["cp850", "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜø£Ø×ƒáíóúñÑªº¿®¬½¼¡«»░▒▓│┤ÁÂÀ©╣║╗╝¢¥┐└┴┬├─┼ãÃ╚╔╩╦╠═╬¤ðÐÊËÈıÍÎÏ┘┌█▄¦Ì▀ÓßÔÒõÕµþÞÚÛÙýÝ¯´\xad±‗¾¶§÷¸°¨·¹³²■\xa0"],
]);

/** What texts are written in and read as. The lines below are of the first three parts of `ownCandidates`. */
const mixedUp = lazily(() => [
  ...ownCandidates(),
  ...candidates(`
  iso-2022-jp 2 ja en
  cp437 6 en fr de es it nl sv fi; cp850 6 en fr de es pt it nl sv da no fi is
  utf-16le 6 en zh ja; utf-16be 8 en zh ja`),
]);

/** What a pair costs: little where both are used in one part of the world, or much is written or read so. */
function mixUpBits(written: Candidate, read: Candidate): number {
  const isUsual = written.region === read.region || written.encoding === "utf-8" ||
    ["utf-8", "windows-1252", "gbk"].includes(read.encoding);
  return MIX_UP + written.rarity + read.rarity + (isUsual ? 0 : UNUSUAL);
}

/** The bytes behind a text, as Latin-1, split where bytes were lost. */
type Pieces = readonly string[];

/** The bytes that may be behind a text, with the encodings that would read them so. */
function readersOf(text: string): Iterable<readonly [Pieces, Candidate[]]> {
  const found = new Map<string, readonly [Pieces, Candidate[]]>();
  const isAscii = /^\p{ASCII}*$/u.test(text), isLossy = text.includes("\ufffd");
  for (const read of mixedUp()) {
    const { encoding } = read;
    // What is read as UTF-8 loses all that is not; what is read as ISO-2022-JP is hardly garbled; UTF-16 loses nothing.
    if (encoding === "iso-2022-jp" || encoding === "utf-8" && !isAscii || encoding.startsWith("utf-16") && isLossy) {
      continue;
    }
    const pieces = text.split("\ufffd").map((piece) => bytesBehind(piece, encoding));
    if (!pieces.every((piece) => piece !== undefined)) continue;
    const key = pieces.join("\ufffd");
    found.set(key, [pieces, [...found.get(key)?.[1] ?? [], read]]);
  }
  return found.values();
}

/** The bytes that were read as this text; undefined if it has a character that is not read so. */
function bytesBehind(text: string, read: string): string | undefined {
  const dos = DOS.get(read);
  if (dos !== undefined) {
    const codes = text.replace(/\P{ASCII}/gu, (character) => String.fromCharCode(dos.indexOf(character) + 0x80));
    return codes.includes("\x7f") ? undefined : codes;
  }
  // All Latin-1 is windows-1252 here; elsewhere it has control characters.
  const { bytes, lost } = encodeText(
    read === "windows-1252" ? text.replace(/[\x80-\x9f]/g, asWindows1252) : text,
    read,
    "replacement",
  );
  if (lost === 0) return latin1(bytes);
  const unwritten = UNWRITTEN.get(read)?.();
  if (unwritten === undefined || ![...text].some((character) => unwritten.has(character))) return undefined;
  const codes = Array.from(text, (character) => unwritten.get(character) ?? bytesBehind(character, read));
  return codes.includes(undefined) ? undefined : codes.join("");
}

const asWindows1252 = (control: string) => decodeText(Uint8Array.of(control.charCodeAt(0)), "windows-1252");

/** The bytes of characters that are read but never written (Encoding §11.1, §12.1, §12.3). */
const UNWRITTEN: ReadonlyMap<string, () => ReadonlyMap<string, string>> = new Map([
  ["big5", lazily(() => charactersIn("big5", "", 0x87, 0xa0))],
  ["euc-jp", lazily(() => charactersIn("euc-jp", "\x8f", 0xa1, 0xfe))],
  ["shift_jis", lazily(() => charactersIn("shift_jis", "", 0xf0, 0xf9))],
]);

function charactersIn(encoding: string, before: string, first: number, last: number): ReadonlyMap<string, string> {
  const columns = numbers(0x40, 0xfe);
  const codes = numbers(first, last).flatMap((row) =>
    columns.map((column) => before + String.fromCharCode(row, column))
  );
  const characters = decodeReading(latin1Bytes(codes.join("\n")), encoding).split("\n");
  return new Map(characters.map((character, i) => [character, codes[i]!]));
}

/**
 * Bytes, as Latin-1, that often come damaged: in UTF-8, a no-break space made a space, a 9D dropped, and of a character
 * with a byte lost (an FF here), the rest; in ISO-2022-JP, whose characters are two bytes from one escape to the next,
 * the escape characters.
 */
const REPAIRS: ReadonlyMap<string, (bytes: string) => string> = new Map([
  [
    "utf-8",
    (bytes) =>
      bytes.replace(/([\xc2-\xdf]|[\xe1-\xef][\x80-\xbf]) /g, "$1\xa0").replace(
        /\xe2\x80(?![\x80-\xbf\xff])/g,
        "$&\x9d",
      )
        .replace(/(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})?\xff+[\x80-\xbf]{0,2}/g, "\xff"),
  ],
  // deno-lint-ignore no-control-regex
  ["iso-2022-jp", (bytes) => bytes.replace(/\x1b?\$[@B]((?:[!-~]{2})*?)(?:\x1b?\([BJ]|$)/g, "\x1b$$B$1\x1b(B")],
]);

interface Meaning {
  readonly text: string;
  /** For what was cut off; fewer for what proves itself. */
  readonly bits: number;
}

/** The texts that bytes may have been. */
function meanings(pieces: Pieces, written: Candidate): readonly Meaning[] {
  const { encoding } = written;
  if (pieces.length > 1) {
    return meaningsOfPieces(pieces, written).filter(({ text }) => countLost(text) * 3 <= text.length);
  }
  const [given = ""] = pieces, bytes = REPAIRS.get(encoding)?.(given) ?? given;
  const starts = isMultiByte(encoding) && /^[\x80-\xff]..../s.test(bytes) ? [0, 1] : [0];
  return starts.flatMap((start) => {
    const text = decodeReading(latin1Bytes(bytes.slice(start)), encoding).replace(/^\ufeff/, "");
    // A character may be cut off at each end. Other bytes hardly ever look like UTF-8.
    const kept = isWide(encoding) ? text.replace(/^\ufffd{1,3}(?=..)|(?<=..)\ufffd{1,3}$/gsu, "") : text;
    const cut = text.length - kept.length + start, beyondAscii = kept.replace(/\p{ASCII}/gu, "").length;
    const proof = encoding === "utf-8" ? Math.min(10, beyondAscii) : 0;
    return cut > 0 && beyondAscii === 0 ? [] : [{ text: kept, bits: cut * CUT - proof }];
  });
}

function meaningsOfPieces(pieces: Pieces, written: Candidate): readonly Meaning[] {
  const { encoding } = written;
  if (encoding.startsWith("utf-16") || encoding === "iso-2022-jp") return [];
  // What was lost may be part of a character: FF is part of none.
  if (encoding === "utf-8") {
    return [{ text: decodeReading(latin1Bytes(REPAIRS.get(encoding)!(pieces.join("\xff"))), encoding), bits: 0 }];
  }
  return [{ text: pieces.map((bytes) => aligned(bytes, written)).join("\ufffd"), bits: 0 }];
}

/** A piece after something lost may begin within a character. */
function aligned(bytes: string, { encoding, languages }: Candidate): string {
  if (!isMultiByte(encoding)) return decodeReading(latin1Bytes(bytes), encoding);
  const [whole = "", rest = ""] = [bytes, bytes.slice(1)].map((bytes) =>
    decodeReading(latin1Bytes(bytes), encoding).replace(/^\ufffd|\ufffd$/g, "")
  );
  return bitsOf(rest, languages()) + CUT < bitsOf(whole, languages()) ? rest : whole;
}

/** What is not a mix-up but looks like one: what it is, and what it stands for. */
const OTHER_ESCAPES:
  readonly (readonly [note: string, escape: RegExp, meaning: (escape: string, ...groups: string[]) => string])[] = [
    [
      "character references of HTML",
      /&#(?:x([0-9a-f]{1,6})|(\d{1,7}));/gi,
      (escape, hex, decimal) => characterOf(hex ? parseInt(hex, 16) : Number(decimal)) ?? escape,
    ],
    [
      "escapes of JavaScript and JSON",
      /\\u(?:([0-9a-f]{4})|\{([0-9a-f]{1,6})\})/gi,
      (escape, four, any) => characterOf(parseInt(four ?? any ?? "", 16)) ?? escape,
    ],
    ["percent-encoding of URLs", /(?:%[0-9a-f]{2})+/gi, (escape) => {
      const bytes = latin1Bytes(bytesIn(escape, "%"));
      return decodeReading(bytes, isMostlyUtf8(bytes) ? "utf-8" : detect(bytes)[0]?.encoding ?? "utf-8");
    }],
    [
      "encoded words of mail",
      /=\?([\w-]{1,40})\?([bq])\?([^?\s]*)\?=(?:\s+(?==\?))?/gi,
      (escape, charset, form, code) => encodedWord(charset ?? "", form === "b" || form === "B", code ?? "") ?? escape,
    ],
  ];

const characterOf = (codePoint: number) => codePoint <= 0x10ffff ? String.fromCodePoint(codePoint) : undefined;

/** Two hexadecimal digits after a sign are a byte. */
function bytesIn(text: string, sign: "%" | "="): string {
  return text.replace(
    /[%=]([0-9a-f]{2})/gi,
    (escape, hex) => escape[0] === sign ? String.fromCharCode(parseInt(hex, 16)) : escape,
  );
}

/** RFC 2047 §2 and §4. */
function encodedWord(charset: string, isBase64: boolean, code: string): string | undefined {
  try {
    return new TextDecoder(charset).decode(
      latin1Bytes(isBase64 ? atob(code) : bytesIn(code.replaceAll("_", " "), "=")),
    );
  } catch {
    return undefined; // No such charset, or no such code.
  }
}

function otherThanMixUps(text: string): Diagnosis[] {
  const found = OTHER_ESCAPES.flatMap(([note, escape, meaning]): Diagnosis[] => {
    const meant = text.replace(escape, meaning);
    return meant === text || /^\p{ASCII}*$/u.test(meant)
      ? []
      : [{ steps: [], text: meant, lost: countLost(meant), note }];
  });
  const lost = countLost(text), note = "read as UTF-8, which it was not: what was there is lost for good";
  return lost === 0 || !/\p{L}/u.test(text)
    ? found
    : [...found, { steps: [{ written: "unknown", read: "utf-8" }], text, lost, note }];
}

// ── Media types ──────────────────────────────────────────────────────────────────────────────────
// A file's type follows from its extension, or from a look into it; the charsets it may be in, from its type.

/** Media types, each with the extensions that mean it. Source code is text to be read. */
const mediaTypes = lazily((): ReadonlyMap<string, string> =>
  new Map(
    `text/html html htm shtml; text/plain txt text log conf ini cfg md5 sha256 rst proto graphql lock properties
    text/plain tsx jsx scss sass less rs go java kt rb php ps1 bat cmd vue svelte pl lua swift cs vb vbs asp sql.in
    text/plain lrc ass ssa cue nfo diz reg inf po pot url desktop env smi utf8 asc bib cls sty tex.in
    text/markdown md markdown; text/css css; text/csv csv; text/tab-separated-values tsv; text/calendar ics
    text/vcard vcf; text/vtt vtt; text/wgsl wgsl; text/x-opml opml; text/x-c c h cc cpp hpp; text/x-python py
    text/x-shellscript sh; text/x-diff diff patch; text/x-tex tex; text/javascript js mjs cjs
    application/json json map; application/json5 json5; application/jsonc jsonc; application/x-ndjson jsonl ndjson
    application/ld+json jsonld; application/x-ipynb+json ipynb; application/manifest+json webmanifest
    application/geo+json geojson; model/gltf+json gltf; application/wasm wasm; application/toml toml
    application/yaml yaml yml; application/xml xml xsl xsd plist; application/xhtml+xml xhtml xht
    application/rss+xml rss; application/atom+xml atom; application/rdf+xml rdf; application/gpx+xml gpx
    application/vnd.google-earth.kml+xml kml; application/dash+xml mpd; application/mathml+xml mathml
    application/x-subrip srt; application/sql sql; application/x-sh csh; image/svg+xml svg svgz; image/png png
    image/jpeg jpg jpeg jfif; image/gif gif; image/webp webp; image/avif avif; image/bmp bmp; image/tiff tif tiff
    image/vnd.microsoft.icon ico cur; image/apng apng; image/jxl jxl; image/heic heic; audio/mpeg mp3
    audio/ogg ogg oga opus; audio/wav wav; audio/flac flac; audio/mp4 m4a m4b; audio/aac aac; audio/midi mid midi
    audio/webm weba; audio/x-matroska mka; audio/x-mpegurl m3u; video/mp4 mp4 m4v; video/iso.segment m4s
    video/webm webm; video/ogg ogv; video/quicktime mov; video/x-msvideo avi; video/x-matroska mkv; video/3gpp 3gp
    video/mpeg mpeg mpg; video/mp2t ts mts; application/vnd.apple.mpegurl m3u8; model/gltf-binary glb
    model/vnd.usdz+zip usdz; font/woff woff; font/woff2 woff2; font/ttf ttf; font/otf otf; font/collection ttc
    application/vnd.ms-fontobject eot; application/pdf pdf; application/rtf rtf; application/epub+zip epub
    application/zip zip; application/gzip gz tgz; application/x-bzip2 bz2; application/x-xz xz; application/zstd zst
    application/x-tar tar; application/x-7z-compressed 7z; application/vnd.rar rar; application/java-archive jar
    application/vnd.android.package-archive apk; application/vnd.google-earth.kmz kmz; message/rfc822 eml mht mhtml
    application/msword doc; application/vnd.ms-excel xls; application/vnd.ms-powerpoint ppt
    application/vnd.openxmlformats-officedocument.wordprocessingml.document docx
    application/vnd.openxmlformats-officedocument.spreadsheetml.sheet xlsx
    application/vnd.openxmlformats-officedocument.presentationml.presentation pptx
    application/vnd.oasis.opendocument.text odt; application/vnd.oasis.opendocument.spreadsheet ods
    application/vnd.oasis.opendocument.presentation odp; application/x-sqlite3 sqlite sqlite3; application/octet-stream bin
    application/octet-stream exe dll iso img dmg deb rpm msi data; application/x-shockwave-flash swf`
      .split(/[;\n]/).map((row) => row.trim().split(" "))
      .flatMap(([type, ...extensions]) => extensions.map((extension) => [`.${extension}`, type!] as const)),
  )
);

type Types = Readonly<Record<string, string>>;

/** Media type that the end of a name means; those of `--type` come first. */
function typeOfExtension(name: string, own: Types): string | undefined {
  const extension = /\.[^.\/]+$/.exec(name)?.[0].toLowerCase();
  if (extension === undefined) return undefined;
  return (Object.hasOwn(own, extension) ? own[extension] : undefined) ?? mediaTypes().get(extension);
}

/** Compressed files that browsers load as what is in them; other `.gz` files are meant to stay compressed. */
const LOADED_COMPRESSED = /\.(?:wasm|data|unityweb)\.gz$|\.svgz$/i;

/** Media type of a file by its name, and its coding, if the name says that it is compressed. */
function typeOfName(name: string, own: Types): { readonly type: string | undefined; readonly coding?: Coding } {
  const coding = /\.br$/i.test(name) ? "br" : LOADED_COMPRESSED.test(name) ? "gzip" : undefined;
  if (coding === undefined) return { type: typeOfExtension(name, own) };
  return { type: typeOfExtension(name.replace(/\.(?:br|gz)$/i, ""), own) ?? "application/octet-stream", coding };
}

/** Media type of a file whose name does not say it, or says it of two kinds: `.ts` is MPEG only if that is in it. */
function typeOfContent(type: string | undefined, sample: Uint8Array): string {
  if (type !== undefined && (type !== "video/mp2t" || isTransportStream(sample))) return type;
  return isText(sample) ? "text/plain" : "application/octet-stream";
}

/** ISO 13818-1 §2.4.3: packets of 188 bytes that begin with 47; in `.mts` each stands behind four more bytes. */
function isTransportStream(sample: Uint8Array): boolean {
  return [0, 4].some((ahead) => sample[ahead] === 0x47 && sample[ahead + 188 + ahead] === 0x47);
}

/** How much of a file tells whether it is text, in bytes. */
const TEXT_SAMPLE = 4096;

/** Whether these bytes are text in some charset: they have none of those that no text has (MIME Sniffing §7.2). */
function isText(sample: Uint8Array): boolean {
  const bytes = sample.subarray(0, TEXT_SAMPLE);
  if (sniffByteOrderMark(bytes) !== undefined || sniffUtf16(bytes) !== undefined) return true;
  return !bytes.some((byte) => byte < 0x20 && !(byte >= 0x09 && byte <= 0x0d) && byte !== 0x1b);
}

/** UTF-8 by definition (RFC 8259 §8.1, HTML, WebVTT, app manifests), or safest so: scripts. */
const UTF8_TYPE =
  /^(?:text\/(?:javascript|vtt|event-stream|wgsl)|application\/(?:json5?|jsonc|x-ndjson|javascript|ecmascript|toml|yaml)|[^;]+\+json)$/;
/** Text that may be in any charset, and says in which. */
const TEXT_TYPE = /^(?:text\/.*|application\/(?:xml|sql|x-subrip|x-sh)|audio\/x-mpegurl|[^;]+\+xml)$/;
/** Types whose Content-Type has no charset parameter by definition. */
const UNLABELLED_TYPE = /json[5c]?$|^text\/event-stream$|^application\/(?:toml|yaml)$/;
const MARKUP_TYPE = /^text\/html$|xml$/;
/** Types that are no text, but worth compressing. */
const COMPRESSIBLE_TYPE =
  /^(?:application\/(?:wasm|rtf|vnd\.ms-fontobject)|font\/(?:ttf|otf|collection)|image\/(?:bmp|vnd\.microsoft\.icon)|audio\/midi|model\/gltf-binary|message\/rfc822)$/;

/** Which charsets a type may be in: any, UTF-8 alone, or none, since it is no text. */
type CharsetRule = "any" | "utf-8" | "none";

function charsetRule(type: string): CharsetRule {
  return UTF8_TYPE.test(type) ? "utf-8" : TEXT_TYPE.test(type) ? "any" : "none";
}

/** The one place that makes a Content-Type. A `declare` of "none" claims nothing. */
function contentType(type: string, charset: string | undefined, declare: string | undefined): string {
  const claimed = charsetRule(type) === "none"
    ? undefined
    : declare ?? (UNLABELLED_TYPE.test(type) ? undefined : charset);
  return claimed === undefined || claimed === "none" ? type : `${type};charset=${claimed}`;
}

/** A place where a document says what charset it is in. */
interface Declaration {
  /** Where the label stands in the text, without quotes and white space around it. */
  readonly start: number;
  readonly end: number;
  readonly label: string;
}

/** How much of a document is searched for declarations: bytes, or characters if it is decoded. */
const DECLARATION_LIMIT = 64 * 1024;
/** HTML §13.2.3.2: so far a `meta` counts wherever it stands; beyond, as in Blink and WebKit, only in the head. */
const PRESCAN_SIZE = 1024;

/** CSS Syntax §3.2: these bytes and no others. */
const CSS_DECLARATION = /^(?:\uFEFF|\xEF\xBB\xBF)?@charset "(?<quoted>[^"\u0080-\uFFFF]*)"(?=;)/;
/** XML §2.8; HTML §13.2.3.2, "get an XML encoding". */
const XML_DECLARATION =
  /^(?:\uFEFF|\xEF\xBB\xBF)?<\?xml(?=\s)[^>]*?\sencoding\s*=\s*(?<quote>["'])(?<quoted>[^\s"'>]+)\k<quote>/;
/** HTML §13.2.5: a comment, a tag as far as its name, or what reads as a comment up to the next `>`. */
const MARKUP = /<(?:!--(?:-?>|[^]*?(?:--!?>|$))|\/?(?<name>[a-z][^\t\n\f\r \/>]*)|[!?\/][^>]*)/gi;
/** HTML §13.2.3.2, "get an attribute". A quote that is never closed takes all the rest. */
const ATTRIBUTE =
  /[\t\n\f\r \/]*(?<name>[^\t\n\f\r \/>][^\t\n\f\r \/>=]*)(?:[\t\n\f\r ]*=[\t\n\f\r ]*(?:(?<quote>["'])(?<quoted>[^]*?)(?:\k<quote>|$)|(?<bare>[^\t\n\f\r >"'][^\t\n\f\r >]*))?)?/gy;
/** HTML §2.5.3, "extracting a character encoding from a meta element": the first `charset=`, whatever follows it. */
const CONTENT_CHARSET =
  /charset[\t\n\f\r ]*=[\t\n\f\r ]*(?:(?<quote>["'])(?<quoted>[^]*?)\k<quote>|(?<bare>[^\t\n\f\r ;"'][^\t\n\f\r ;]*))?/i;
/** HTML §13.2.6.4.4, "in head", and `object`, which older pages have there. */
const HEAD_TAG =
  /^<(?:html|head|\/?(?:base|basefont|bgsound|link|meta|noframes|noscript|object|script|style|template|title))$/;
/** HTML §13.2.6: elements whose content is text to a tokenizer. */
const TEXT_TAG = /^<(?:iframe|noembed|noframes|plaintext|script|style|textarea|title|xmp)$/;

const XHTML = "application/xhtml+xml";

/** All places where a document declares its charset, those that count first before others; a label need not exist. */
function findDeclarations(text: string, type: string): Declaration[] {
  const head = text.slice(0, DECLARATION_LIMIT), isHtml = type === "text/html" || type === XHTML;
  if (type === "text/css") return labelIn(CSS_DECLARATION.exec(head));
  const xml = isHtml || type.endsWith("xml") ? labelIn(XML_DECLARATION.exec(head)) : [];
  // HTML §13.2.3.2: an XML declaration counts in HTML, too, if no `meta` does.
  return isHtml ? [...findMetaDeclarations(head), ...xml] : xml;
}

/** Reads ASCII as ASCII, all else as private-use characters, and is fast (Encoding §14.5). */
const PRESCAN_DECODER = new TextDecoder("x-user-defined");

/** The encoding that a document declares within itself: the first that exists, if any. */
function declaredEncoding(bytes: Uint8Array, type: string): string | undefined {
  if (type !== "text/css" && !MARKUP_TYPE.test(type)) return undefined;
  // HTML §4.2.5.4: in XHTML a `meta` declares nothing. It is only kept from lying when its page is converted.
  const reading = type === XHTML ? "application/xml" : type;
  const declarations = findDeclarations(PRESCAN_DECODER.decode(bytes.subarray(0, DECLARATION_LIMIT)), reading);
  const found = declarations.find(({ label }) => LABELS.includes(label.toLowerCase()));
  const encoding = found && encodingOf(found.label);
  // HTML §13.2.3.2: whoever can read the declaration as ASCII is not reading UTF-16.
  return encoding?.startsWith("utf-16") ? "utf-8" : encoding === "x-user-defined" ? "windows-1252" : encoding;
}

/** A document after conversion, or its first piece if it is long: whatever it declares is now the truth. */
function rewriteDeclarations(text: string, type: string, encoding: string): string {
  let rewritten = "", copied = 0;
  for (const { start, end } of findDeclarations(text, type).sort((a, b) => a.start - b.start)) {
    rewritten += text.slice(copied, start) + encoding;
    copied = end;
  }
  return rewritten + text.slice(copied);
}

/** The label that a grammar found at its end, if it is not empty; `offset` is where the searched text begins. */
function labelIn(match: RegExpExecArray | null, offset = 0): Declaration[] {
  const { quoted, bare } = match?.groups ?? {}, value = quoted ?? bare ?? "", label = value.trim();
  if (match === null || label === "") return [];
  const end = offset + match.index + match[0].length - (quoted === undefined ? 0 : 1);
  const start = end - value.length + value.indexOf(label);
  return [{ start, end: start + label.length, label }];
}

/** What the `meta` elements of a page declare (HTML §13.2.3.2, "prescan a byte stream to determine its encoding"). */
function findMetaDeclarations(page: string): Declaration[] {
  const found: Declaration[] = [];
  let inHead = true;
  MARKUP.lastIndex = 0;
  for (let markup; (markup = MARKUP.exec(page)) !== null && (inHead || markup.index < PRESCAN_SIZE);) {
    if (markup.groups!.name === undefined) continue;
    const tag = markup[0].toLowerCase(), attributes: RegExpExecArray[] = [];
    let last = markup;
    ATTRIBUTE.lastIndex = MARKUP.lastIndex;
    for (last of page.matchAll(ATTRIBUTE)) if (tag === "<meta") attributes.push(last);
    const end = page.indexOf(">", last.index + last[0].length);
    if (end === -1) break; // The page ends within the tag: then it is none.
    found.push(...declarationsOf(attributes));
    inHead &&= HEAD_TAG.test(tag);
    MARKUP.lastIndex = TEXT_TAG.test(tag) ? textEnd(page, tag.slice(1), end) : end;
  }
  return found;
}

/** What one `meta` element declares: `charset`, or `content` if `http-equiv` says that it is a Content-Type. */
function declarationsOf(attributes: readonly RegExpExecArray[]): Declaration[] {
  const values = (name: string) =>
    attributes.filter(({ groups }) => groups!.name!.toLowerCase() === name).flatMap((match) => labelIn(match));
  const contents = values("http-equiv")[0]?.label.toLowerCase() === "content-type" ? values("content") : [];
  return [...values("charset"), ...contents.flatMap(({ start, label }) => labelIn(CONTENT_CHARSET.exec(label), start))];
}

/** Where the text of an element ends: at its end tag. */
function textEnd(page: string, name: string, start: number): number {
  const edges = new RegExp(`<!--(?!-?>)|-->|<(/?)${name}(?=[\\t\\n\\f\\r />])`, "gi");
  edges.lastIndex = start;
  // HTML §13.2.5.15 ff.: within what looks like a comment, a script may have `<script>…</script>` as text.
  let depth = 0;
  for (const { 0: edge, 1: slash, index } of page.matchAll(edges)) {
    if (slash === undefined) depth = edge === "-->" ? 0 : depth || 1;
    else if (slash === "") depth &&= 2;
    else if (depth < 2 || name !== "script") return index;
    else depth = 1;
  }
  return page.length;
}

// ── Pages ────────────────────────────────────────────────────────────────────────────────────────
// The pages that the server writes itself: their style, and the listings of folders, which have a validator as files
// have, and tell nothing that may not be served.

/** For every page of our own: it runs no script and loads nothing, whatever its text turns out to be (CSP 3). */
const PAGE_POLICY =
  "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

const PAGE_STYLE = `
:root { color-scheme: light dark; --ink: light-dark(#1c1b1a, #ece9e4); --soft: light-dark(#5f5a54, #a9a39b); --paper: light-dark(#fdfcfa, #181716);
  --panel: light-dark(#f4f1ec, #22201e); --line: light-dark(#d9d3ca, #3b3834); --accent: light-dark(#9a3412, #fdba74); --wrong: light-dark(#fde68a, #713f12) }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; color: var(--ink); background: var(--paper); font: 1rem/1.6 system-ui, sans-serif }
h1 { font: 600 clamp(1.6rem, 5vw, 2.4rem)/1.15 Georgia, "Noto Serif", serif; margin: .5rem 0 }
h2 { font: 600 1.25rem/1.3 Georgia, "Noto Serif", serif; margin: 2.5rem 0 .5rem }
p { max-width: 44rem; margin: .5rem 0 } small, .soft, dt { color: var(--soft) } a { color: var(--accent) }
code, pre, .bytes { font-family: ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; font-size: .875rem }
.card { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); padding: 1.25rem; background: var(--panel); border: 1px solid var(--line); border-radius: .5rem }
.card .wide { grid-column: 1 / -1 } label { display: grid; gap: .25rem; font-weight: 600 } .search { display: flex; flex-wrap: wrap; align-items: end; gap: .75rem; margin-block: 1rem } .search label:first-of-type { flex: 1 1 16rem; max-width: 30rem }
textarea, select, input, button { font: inherit; font-weight: 400; color: inherit; width: 100%; padding: .5rem .75rem; background: var(--paper); border: 1px solid var(--soft); border-radius: .25rem }
textarea { min-height: 5rem; resize: vertical } button { justify-self: start; width: auto; padding-inline: 1.5rem; color: var(--paper); background: var(--accent); border-color: var(--accent); font-weight: 600; cursor: pointer }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
details { margin: .5rem 0 } summary { cursor: pointer; padding: .25rem 0 } .scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% } caption { text-align: start; color: var(--soft); padding-bottom: .5rem }
th, td { text-align: start; vertical-align: top; padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--line) } th { font-weight: 600; white-space: nowrap } .number { text-align: end; white-space: nowrap; font-variant-numeric: tabular-nums } td time { white-space: nowrap } td.text { overflow-wrap: anywhere; min-width: 14rem } form td.text { min-width: 0; width: 100% }
th button { padding: 0; color: var(--accent); background: none; border: 0; text-decoration: underline } .tick { display: flex; align-items: center; gap: .5rem; padding-block: .5rem; font-weight: 400 } .tick input { width: auto }
.search + form { margin-top: 1.5rem } .results { padding-inline-start: 2.5rem } .results li { margin: 1rem 0; overflow-wrap: anywhere } .results p { margin: 0 } main:has(.over) .running { display: none } @media (max-width: 30rem) { .clock { display: none } .results { padding-inline-start: 2rem } caption ~ tbody td { display: block; border: 0; padding-block: .3rem 0 } caption ~ tbody td + td { border-bottom: 1px solid var(--line); padding-block: 0 .3rem } }
.char { font-size: 1.35rem; line-height: 1.2 } mark { color: inherit; background: var(--wrong); border-radius: .2em; padding: 0 .1em } .notice { padding: .75rem 1.25rem; background: var(--wrong); border-radius: .5rem }
.greetings { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem 1.5rem; margin: 1rem 0 } .greetings dd { margin: 0 }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem } footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft) }
@media print { form, nav { display: none } body { max-width: none; padding: 0 } h2 { break-after: avoid } tr { break-inside: avoid } }
`;

/** A whole page. */
function pageHtml(title: string, body: string): string {
  return `<!DOCTYPE html>
<html lang="en">
<head>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>${escapeMarkup(title)}</title>
<style>${PAGE_STYLE}</style>
</head>
<body>
${body}
</body>
</html>
`;
}

/** A small page that says one thing, and leads up from a path. */
function noticeHtml(title: string, body: string, path: string): string {
  const up = path === "" || path === "/" ? "" : `\n<nav><a href="${path.endsWith("/") ? "../" : "./"}">Up</a></nav>`;
  return pageHtml(title, `<main><h1>${title}</h1>\n${body}${up}</main>`);
}

/** Most entries that one page of a listing shows. */
const LISTING_PAGE = 1000;
/** Entries that are looked at before others get their turn. */
const LISTING_SLICE = 500;
/** Most names that are sorted as people do, and not by their code units. */
const COLLATED = 10_000;
/** How often a folder that changes while it is looked at is looked at anew. */
const LISTING_ATTEMPTS = 5;

type FolderFound = Resource & { kind: "folder" };

/** What is in a folder: a file or another folder. */
interface FolderEntry {
  readonly name: string;
  /** Where it is: no part of it is a symbolic link. */
  readonly real: string;
  readonly info: FileInfo;
  readonly isFolder: boolean;
  /** In bytes; 0 for a folder. */
  readonly size: number;
  /** Last modification, in milliseconds. */
  readonly time: number;
}

/** What a listing is asked for: in which order, which page. */
interface ListingQuery {
  readonly sort: "name" | "size" | "time";
  readonly descending: boolean;
  readonly page: number;
}

/** A folder: what is in it, or what is found below it. */
function representFolder(exchange: Exchange, folder: FolderFound): Message | Promise<Message> {
  const { query, server } = exchange;
  if (server.settings.noListing) throw new HttpError(403, "This folder is not listed");
  const search = readSearch(query);
  if (search.words.length > 0) return searchMessage(exchange, folder, search);
  const [, minus, sort = ""] = /^(-?)(size|time|name)$/.exec(query.get("sort") ?? "") ?? [];
  return listFolder(exchange, folder, {
    sort: sort === "size" || sort === "time" ? sort : "name",
    descending: minus === "-" || query.has("desc"),
    page: numberParameter(query, "page", 1, 1_000_000) ?? 1,
  });
}

const PAGE_FIELDS = { Vary: "Accept", "Cache-Control": "no-cache", "Content-Security-Policy": PAGE_POLICY };

/** A listing, as a page, or as JSON for those who prefer it. Its validator is made of what it shows. */
async function listFolder(exchange: Exchange, folder: FolderFound, asked: ListingQuery): Promise<Message> {
  const { entries, count } = await readPage(exchange.server.site(), folder.path, asked);
  const pages = Math.max(1, Math.ceil(count / LISTING_PAGE));
  if (asked.page > pages) throw new HttpError(404, `This folder has no page ${asked.page}`);
  const body = prefersJson(exchange)
    ? JSON.stringify(entries.map(describeForPrograms), null, 1) + "\n"
    : listingHtml(exchange, folder, entries, { ...asked, count, pages });
  const type = prefersJson(exchange) ? "application/json" : "text/html";
  const message = await representContent(exchange, { type, headers: PAGE_FIELDS, body });
  if (!isWhole(message)) return message;
  const label = message.fields.find(([name]) => name === "Content-Type")!.join();
  const etag = `"${await digestOfBytes(concat([latin1Bytes(label), message.content]))}"`;
  const tagged: Message = { ...message, fields: [...message.fields, ["ETag", etag]], isListing: true };
  // Nobody knows when what is in a folder last changed: there is no date to compare with.
  const status = evaluatePreconditions(exchange.head, { etag, time: NaN });
  return status === 304 ? { ...notModified(tagged), isListing: true } : tagged;
}

/** Whether a client would rather have JSON than a page (RFC 9110 §12.5.1). */
function prefersJson(exchange: Exchange): boolean {
  const accepted = parseAccept(exchange.header("accept") ?? "");
  return (accepted.get("application/json") ?? 0) > (accepted.get("text/html") ?? 0);
}

function describeForPrograms({ name, isFolder, size, time }: FolderEntry) {
  const modified = new Date(time);
  return isFolder ? { name, type: "folder", modified } : { name, type: "file", size, modified };
}

/** The entries of one page, and how many the folder has, which was reached without a link. Throws 404 or 503. */
async function readPage(site: Site, path: string, asked: ListingQuery) {
  for (let attempt = 0; attempt < LISTING_ATTEMPTS; attempt++) {
    const folder = lstatOf(path), listed = await readFolder(site, path).catch(undefinedIfAbsent);
    if (folder === undefined || listed === undefined) throw new HttpError(404, "This folder no longer exists");
    const { entries, isWhole } = await describePage(path, listed, asked);
    // What is gone may have been elsewhere, too, while the names were read.
    if (!isWhole && attempt < LISTING_ATTEMPTS - 1) continue;
    // If the folder was swapped for a link meanwhile, nothing from elsewhere may be shown.
    const shown = entries.filter(({ name }) => !listed.links.has(name));
    const isShown = (found: FileInfo) => {
      const entry = shown[Math.floor(Math.random() * shown.length)], info = entry && lstatOf(entry.real);
      return entry === undefined ? isSameFile(found, folder) : info !== undefined && isSameFile(info, entry.info);
    };
    const count = listed.folders.length + listed.files.length;
    if (site.server.settings.followLinks || isReachedDirectly(path, isShown)) return { entries, count };
  }
  throw new HttpError(503, "This folder is being changed", [["Retry-After", "1"]]);
}

/** The names in a folder, sorted, and the entries that are symbolic links, described. */
interface Listed {
  readonly folders: readonly string[];
  readonly files: readonly string[];
  readonly links: ReadonlyMap<string, FolderEntry>;
}

/** What is in a folder, and may be shown. */
async function readFolder(site: Site, path: string): Promise<Listed> {
  const { settings, log } = site.server;
  const folders: string[] = [], files: string[] = [], links = new Map<string, FolderEntry>();
  let count = 0, unreadable = 0;
  for await (const { name, isFile, isDirectory, isSymlink } of Deno.readDir(path)) {
    if (!settings.dotfiles && name.startsWith(".")) continue;
    // Links may lead anywhere: only a look tells. Other names are looked at when they are shown.
    const entry = isSymlink ? describeLink(site, pathBelow({ path }, name)) : undefined;
    if (isSymlink && ++count % LISTING_SLICE === 0) await yieldToOthers();
    if (name.includes("\ufffd") && lstatOf(pathBelow({ path }, name)) === undefined) unreadable++;
    else if (isDirectory || entry?.isFolder) folders.push(name);
    else if (isFile || entry !== undefined) files.push(name);
    if (entry !== undefined) links.set(name, entry);
  }
  if (unreadable > 0) {
    log.notice(`names that are not UTF-8 cannot be served: ${unreadable} in ${path} (convmv renames them)`);
  }
  return { folders: sortNames(folders), files: sortNames(files), links };
}

const collator = lazily(() => new Intl.Collator(undefined, { numeric: true, sensitivity: "base" }));

/** Sorts names as people do: numbers by value, case aside. */
function sortNames(names: string[]): string[] {
  names.sort();
  return names.length > COLLATED ? names : names.sort(collator().compare);
}

/** The entries of one page, and whether all were still there. Only an order by size or time needs to look at all. */
async function describePage(path: string, listed: Listed, asked: ListingQuery) {
  const { sort, descending, page } = asked, { folders, files, links } = listed, entries: FolderEntry[] = [];
  const onPage = <T>(list: readonly T[]) => list.slice((page - 1) * LISTING_PAGE, page * LISTING_PAGE);
  const names = [folders, files].flatMap((names) => sort === "name" && descending ? names.toReversed() : names);
  const described = sort === "name" ? onPage(names) : names;
  for (const [i, name] of described.entries()) {
    if (i % LISTING_SLICE === LISTING_SLICE - 1) await yieldToOthers();
    const entry = links.get(name) ?? describeEntry(pathBelow({ path }, name));
    if (entry !== undefined) entries.push(entry);
  }
  const isWhole = entries.length === described.length, sign = descending ? -1 : 1;
  if (sort === "name") return { entries, isWhole };
  entries.sort((a, b) => Number(b.isFolder) - Number(a.isFolder) || sign * (a[sort] - b[sort]));
  return { entries: onPage(entries), isWhole };
}

/** A file or folder that no link leads to; undefined for what is neither, or is gone. */
function describeEntry(path: string): FolderEntry | undefined {
  try {
    return entryOf(nameOf(path), path, Deno.lstatSync(path));
  } catch {
    return undefined;
  }
}

/** What a link leads to, under the link's name; undefined for what is gone, is hidden, or lies outside ROOT. */
function describeLink(site: Site, path: string): FolderEntry | undefined {
  try {
    const found = findInside(site, path);
    return found && entryOf(nameOf(path), found.real, found.info);
  } catch {
    return undefined;
  }
}

function entryOf(name: string, real: string, info: FileInfo): FolderEntry | undefined {
  const { isFile, isDirectory: isFolder, size, mtime } = info;
  if (!isFile && !isFolder) return undefined;
  return { name, real, info, isFolder, size: isFolder ? 0 : size, time: mtime?.getTime() || 0 };
}

function listingHtml(
  exchange: Exchange,
  { segments }: FolderFound,
  entries: readonly FolderEntry[],
  { sort, descending, page, count, pages }: ListingQuery & { readonly count: number; readonly pages: number },
): string {
  const suffix = keptQuery(exchange, {}), sign = descending ? "-" : "";
  const order: Record<string, string> = sort === "name" && !descending ? {} : { sort: sign + sort };
  // Buttons, and not links: a program that follows all links would fetch each folder in each order.
  const column = (title: string, key: ListingQuery["sort"]) => {
    const current = sort === key, value = current && !descending ? `-${key}` : key;
    const direction = current ? ` aria-sort="${descending ? "descending" : "ascending"}"` : "";
    return `<th scope="col"${
      key === "size" ? ' class="number"' : ""
    }${direction}><button name="sort" value="${value}">${
      current ? `${title} <span aria-hidden="true">${descending ? "↓" : "↑"}</span>` : title
    }</button>`;
  };
  const rows = entries.map(({ name, isFolder, size, time }) =>
    `<tr><td class="text"><a href="${encodeURIComponent(name)}${isFolder ? "/" : ""}${suffix}" dir="auto">${
      escapeMarkup(name)
    }${isFolder ? "/" : ""}</a></td><td class="number">${sizeHtml(isFolder, size)}</td><td>${timeHtml(time)}</td></tr>`
  );
  const link = (number: number, text: string) =>
    `<a href="${keptQuery(exchange, { ...order, ...(number > 1 && { page: String(number) }) }) || "./"}">${text}</a>`;
  return pageHtml(
    titleOf(exchange, segments),
    `${headerHtml(exchange, segments)}
<main>${searchHtml(exchange, { words: [], text: "", inText: false })}
<form>${keptFields(exchange)}<table><thead><tr>${column("Name", "name")}${column("Size", "size")}${
      column('Modified<span class="clock"> (UTC)</span>', "time")
    }</thead>
<tbody>${rows.join("\n")}</tbody></table></form>
<nav aria-label="Pages"><span class="soft">${count} ${count === 1 ? "entry" : "entries"}${
      pages > 1 ? `, page ${page} of ${pages}` : ""
    }</span>${page > 1 ? link(page - 1, "Previous page") : ""}${
      page < pages ? link(page + 1, "Next page") : ""
    }</nav></main>`,
  );
}

/** What a tab shows: the folder's own name first, since there is little room. */
function titleOf({ authority }: Exchange, segments: readonly string[]): string {
  return [segments.at(-1), authority].filter(Boolean).join(" – ") || "/";
}

/** Where a page is: links to the folders above. */
function headerHtml(exchange: Exchange, segments: readonly string[], isBelow = false): string {
  const suffix = keptQuery(exchange, {});
  const crumbs = ["/", ...segments].map((name, i) => {
    const up = segments.length - i;
    if (up === 0 && !isBelow) return escapeMarkup(name);
    return `<a href="${"../".repeat(up) || "./"}${suffix}" dir="auto">${escapeMarkup(name)}</a>`;
  });
  return `<header><nav aria-label="Folders"><h1>${crumbs.join(" ")}</h1></nav></header>`;
}

/** A query that keeps the charset that the request asked for; empty if there is nothing in it. */
function keptQuery({ query }: Exchange, more: Readonly<Record<string, string>>): string {
  const charset = query.get("charset");
  const kept = new URLSearchParams({ ...(charset !== null && { charset }), ...more }).toString();
  return kept && `?${escapeMarkup(kept)}`;
}

/** The same for a form. */
function keptFields({ query }: Exchange): string {
  const charset = query.get("charset");
  return charset === null ? "" : `<input type="hidden" name="charset" value="${escapeMarkup(charset)}">`;
}

function sizeHtml(isFolder: boolean, size: number): string {
  return isFolder ? "" : `<span title="${size} ${size === 1 ? "byte" : "bytes"}">${formatSize(size)}</span>`;
}

/** A time in UTC; where there is little room, the day. */
function timeHtml(time: number): string {
  const date = new Date(time).toISOString(), [, day, clock] = /^(.*)T(\d\d:\d\d)/.exec(date)!;
  return `<time datetime="${date}">${day}<span class="clock"> ${clock}</span></time>`;
}

/** A size for people: three digits or so. */
function formatSize(size: number): string {
  const power = Math.min(4, Math.floor(Math.log2(Math.max(1, size)) / 10));
  const value = size / 1024 ** power, digits = power === 0 || value >= 999.5 ? value.toFixed() : value.toPrecision(3);
  return `${digits} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

// ── Search ───────────────────────────────────────────────────────────────────────────────────────
// Words are looked for in the names below a folder and, if asked, in what files say, each read in its own charset.
// What is compared is folded: one form of Unicode, no case, no width. A search goes on in short steps, tells what it
// finds at once, and ends by itself: when all is seen, when that is enough or takes too long, or when nobody listens.

/** Most that a search asks for, in UTF-16 code units and in words. */
const QUERY_LENGTH = 200, QUERY_WORDS = 10;
/** Most that it shows, and longest that it goes on, in milliseconds. */
const SEARCH_RESULTS = 1000, SEARCH_TIME = 10_000;
/** Larger files are passed over, in bytes. */
const SEARCHED_FILE = 16 * 1024 * 1024;
/** Text is read and looked at in pieces of this size, in bytes. */
const SEARCHED_PIECE = 64 * 1024;
/** Most searches at once, and longest that the next one waits, in milliseconds. */
const SEARCHES = 2, SEARCH_WAIT = 5000;
/** Results are sent at such intervals; after that much silence, a line feed is sent. In milliseconds. */
const SEARCH_PACE = 100, SEARCH_SILENCE = 1000;
/** What is shown of a line, and what of that stands before the first word, in UTF-16 code units. */
const SNIPPET_LENGTH = 160, SNIPPET_START = 40;
/** What is looked at again of a line that is longer than a piece: a word may stand on both sides of the cut. */
const LINE_OVERLAP = 2048;

/** What is looked for. */
interface SearchQuery {
  /** As it was typed. */
  readonly text: string;
  /** Its words, folded: all of them must occur. */
  readonly words: readonly string[];
  /** Whether in the text of files, too. */
  readonly inText: boolean;
}

/** A search that goes on: what it is about, and what it has seen. */
interface Search {
  readonly site: Site;
  readonly words: readonly string[];
  readonly inText: boolean;
  readonly letters: Letters;
  readonly started: number;
  names: number;
  /** Whose text was looked at. */
  files: number;
  bytes: number;
  /** Passed over, since they are too large. */
  large: number;
  results: number;
}

/** Something found, where it is below the folder, and the line of its text. */
interface Hit {
  readonly path: readonly string[];
  readonly entry: FolderEntry;
  readonly line?: TextLine | undefined;
}

/** A line of a text, or what is around the words in it. */
interface TextLine {
  readonly number: number;
  readonly text: string;
}

function readSearch(query: URLSearchParams): SearchQuery {
  const text = query.get("q") ?? "", words = [...new Set(fold(text.trim()).split(/\s+/))].filter(Boolean);
  if (text.length > QUERY_LENGTH || words.length > QUERY_WORDS) {
    throw new HttpError(400, `Search for at most ${QUERY_WORDS} words, and ${QUERY_LENGTH} characters`);
  }
  return { text, words, inText: query.get("text") === "1" };
}

/** The answer to a search: it is made, and sent, while the search goes on. */
function searchMessage(exchange: Exchange, folder: FolderFound, query: SearchQuery): StreamMessage {
  const isJson = prefersJson(exchange), charset = isJson ? "utf-8" : exchange.charset;
  const type = contentType(isJson ? "application/json" : "text/html", charset, exchange.server.settings.declare);
  const fields: Field[] = [["Content-Type", type], ...Object.entries(PAGE_FIELDS)];
  if (!isJson) addVary(fields, "Accept-Charset");
  const search = { site: exchange.server.site(), ...query };
  const form = isJson ? jsonResults() : pageResults(exchange, folder, query);
  const read = () => searchPieces(search, folder.path, form, charset);
  return { status: 200, fields, charset, isListing: true, content: { length: undefined, read } };
}

/** How results are written: what stands before them, each of them, and what stands behind. */
interface ResultForm {
  readonly start: string;
  readonly result: (hit: Hit, number: number) => string;
  readonly end: (search: Search) => string;
}

/** The bytes of an answer, as they come. */
async function* searchPieces(
  asked: Pick<Search, "site" | "words" | "inText">,
  folder: string,
  form: ResultForm,
  charset: string,
): AsyncGenerator<Uint8Array> {
  using _ = await searchTurn();
  const letters = lettersOf(asked.inText ? asked.words : []), started = performance.now();
  const search: Search = { ...asked, letters, started, names: 0, files: 0, bytes: 0, large: 0, results: 0 };
  const encoded = (text: string) => encodeText(text, charset, "html").bytes;
  yield encoded(form.start);
  let text = "", told = performance.now() - SEARCH_PACE;
  for await (const hit of searchBelow(search, folder)) {
    if (hit !== undefined) text += form.result(hit, search.results++);
    const now = performance.now();
    if (now - told < (text === "" ? SEARCH_SILENCE : SEARCH_PACE)) continue;
    // White space shows nothing, but sending it tells whether the client is still there.
    yield encoded(text || "\n");
    [text, told] = ["", now];
  }
  yield encoded(text + form.end(search));
}

let searches = 0;
/** Those that wait for one to end. */
const searchQueue: (() => void)[] = [];

/** Waits until there are not too many searches. Throws 503. */
async function searchTurn(): Promise<Disposable> {
  if (searches < SEARCHES) searches++;
  else {
    const { promise, resolve } = Promise.withResolvers<void>();
    searchQueue.push(resolve);
    await within(SEARCH_WAIT, promise);
    const at = searchQueue.indexOf(resolve);
    if (at >= 0) {
      searchQueue.splice(at, 1);
      throw new HttpError(503, "Other searches are under way", [["Retry-After", "5"]]);
    }
  }
  const end = () => {
    const next = searchQueue.shift();
    if (next === undefined) searches--;
    else next();
  };
  return { [Symbol.dispose]: end };
}

function stopReason({ results, started }: Search): string | undefined {
  if (results >= SEARCH_RESULTS) return `more than ${SEARCH_RESULTS} results are not shown`;
  if (performance.now() - started >= SEARCH_TIME) return `no search takes more than ${SEARCH_TIME / 1000} s`;
  return undefined;
}

/**
 * Looks at all that is below a folder, the nearest first. Yields what is found; and undefined in between, so that
 * whoever asks can say that it goes on. Each folder is looked into once, whatever links lead to it.
 */
async function* searchBelow(search: Search, root: string): AsyncGenerator<Hit | undefined> {
  const { site } = search, folders = new Map<string, readonly string[]>([[root, []]]);
  for (const [folder, path] of folders) {
    // What cannot be read is passed over.
    const listed = await readFolder(site, folder).catch(() => undefined);
    if (listed === undefined) continue;
    for (const [i, name] of [...listed.folders, ...listed.files].entries()) {
      if (stopReason(search) !== undefined) return;
      const isFolder = i < listed.folders.length, below = [...path, name], link = listed.links.get(name);
      const real = link?.real ?? pathBelow({ path: folder }, name);
      if (isFolder && !folders.has(real)) folders.set(real, below);
      if (++search.names % LISTING_SLICE === 0) await yieldToOthers();
      const hit = search.inText && !isFolder ? await searchText(search, below, real) : undefined;
      yield hit ?? searchName(search, below, link ?? real);
    }
  }
}

/** What is found by its name, if that has all the words. */
function searchName({ site, words }: Search, path: readonly string[], at: FolderEntry | string): Hit | undefined {
  if (!hasAll(fold(path.at(-1)!), words)) return undefined;
  const entry = typeof at === "string" ? describeEntry(at) : at;
  return entry && isThere(site, entry) ? { path, entry } : undefined;
}

/** Whether something found is in its place still, and was not reached by a link. */
function isThere({ server }: Site, { real, info }: FolderEntry): boolean {
  return server.settings.followLinks || isReachedDirectly(real, (found) => isSameFile(found, info));
}

function hasAll(folded: string, words: readonly string[]): boolean {
  return words.every((word) => folded.includes(word));
}

/** What is found in the text of a file, if that has all the words. What cannot be read is passed over. */
async function searchText(search: Search, path: readonly string[], real: string): Promise<Hit | undefined> {
  const name = path.at(-1)!, { type } = typeOfName(name, search.site.server.settings.type);
  // What is no text by its name is not even opened.
  if (type !== undefined && type !== "video/mp2t" && charsetRule(type) === "none") return undefined;
  try {
    await yieldToOthers();
    using file = await openInTime(real);
    const info = file?.stat(), entry = info?.isFile ? entryOf(name, real, info) : undefined;
    if (file === undefined || entry === undefined || entry.isFolder) return undefined;
    if (entry.size > SEARCHED_FILE) search.large++;
    const line = entry.size > SEARCHED_FILE ? undefined : await findLine(search, file, entry);
    return line && isThere(search.site, entry) ? { path, entry, line } : undefined;
  } catch {
    return undefined;
  }
}

async function findLine(
  search: Search,
  file: OpenFile,
  { name, real, info }: FolderEntry,
): Promise<TextLine | undefined> {
  const sample = new Uint8Array(Math.min(info.size, BUFFERED_LIMIT));
  const length = file.read(sample, 0);
  if (info.size <= BUFFERED_LIMIT && !mayHaveLetters(sample, search.letters)) {
    search.files++;
    search.bytes += length;
    return undefined;
  }
  const nature = await natureOf(search.site, { path: real, name, size: info.size }, sample.subarray(0, length));
  if (nature.coding !== undefined || nature.rule === "none") return undefined;
  search.files++;
  const scan: Scan = { missing: new Set(search.words), lines: 0, line: undefined, most: 0 };
  for await (const block of blocksOf(search, piecesOf(file, info.size, sample.subarray(0, length)), nature)) {
    scanBlock(search.words, scan, block);
    if (scan.missing.size === 0) return scan.line;
    if (stopReason(search) !== undefined) break;
  }
  return undefined;
}

/** Letters of Chinese, Japanese and Korean, up to U+FFFF: they take two bytes or more, wherever they can be written. */
const wideLetter = lazily(() => /(?![\u{10000}-\u{10ffff}])[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Hangul}]/gu);

/**
 * Which pairs of bytes may be one of some letters, in whatever encoding: a bit a letter, and all bits that there are.
 * A file that lacks a letter need not be read. To find out what it is in, and to decode it, would take much longer.
 */
interface Letters {
  readonly bits: Uint8Array;
  readonly all: number;
}

function lettersOf(words: readonly string[]): Letters {
  const letters = [...new Set(words.join("").match(wideLetter()))].slice(0, 8), bits = new Uint8Array(0x10000);
  const all = (1 << letters.length) - 1;
  for (const [i, letter] of letters.entries()) {
    // A letter may be written as another one, and as one with a mark behind it.
    for (const form of new Set([letter, String.fromCodePoint(letter.normalize("NFD").codePointAt(0)!)])) {
      for (const pair of pairsOf(form)) bits[pair]! |= 1 << i;
    }
  }
  bits[0x2623] = all; // `&#` is any letter.
  return { bits, all };
}

function mayHaveLetters(bytes: Uint8Array, { bits, all }: Letters): boolean {
  let found = 0;
  for (let i = 1; i < bytes.length && found !== all; i++) found |= bits[bytes[i - 1]! << 8 | bytes[i]!]!;
  return found === all;
}

const PAIR_LEADS = numbers(0x81, 0xfe), PAIR_TRAILS = numbers(0x20, 0xfe);

/** The pairs of bytes that characters are, or end with, which fold into a letter, or into more with it. */
function pairsOf(letter: string): number[] {
  const pairs: number[] = [];
  for (const [encoding, lines] of foldedPairs()) {
    for (const line of linesWith(lines, letter)) {
      const lead = PAIR_LEADS[Math.trunc(line / PAIR_TRAILS.length)]!, trail = PAIR_TRAILS[line % PAIR_TRAILS.length]!;
      pairs.push(lead << 8 | trail);
      if (encoding === "euc-jp") pairs.push((lead << 8 | trail) & 0x7f7f); // In seven bits, it is ISO-2022-JP.
    }
  }
  for (const unit of linesWith(foldedCharacters(), letter)) {
    // UTF-16 of both kinds, the end of UTF-8, and the four bytes of gb18030.
    pairs.push(unit, unit >> 8 | (unit & 0xff) << 8, (0x80 | unit >> 6 & 0x3f) << 8 | 0x80 | unit & 0x3f);
    const [a = 0, b = 0, c = 0, d] = encodeText(String.fromCharCode(unit), "gb18030", "html").bytes;
    if (d !== undefined) pairs.push(a << 8 | b, c << 8 | d);
    // Half-width katakana are one byte of Shift_JIS, behind any other (Encoding §12.3.1).
    if (unit >= 0xff61 && unit <= 0xff9f) {
      pairs.push(...numbers(0, 0xff).map((byte) => byte << 8 | unit - 0xff61 + 0xa1));
    }
  }
  return pairs;
}

/** The numbers of the lines that have a letter. */
function linesWith(text: string, letter: string): number[] {
  const found: number[] = [];
  let line = 0, counted = 0;
  for (let at = text.indexOf(letter); at >= 0; at = text.indexOf(letter, at + 1)) {
    line += countLines(text.slice(counted, at));
    counted = at;
    found.push(line);
  }
  return found;
}

/** What all pairs of bytes are in the encodings that have pairs, a line each, folded. */
const foldedPairs = lazily(() => {
  const sequences = (before: readonly number[]) =>
    PAIR_LEADS.flatMap((lead) => PAIR_TRAILS.flatMap((trail) => [...before, lead, trail, LF]));
  const pairs = Uint8Array.from(sequences([])), triples = Uint8Array.from(sequences([0x8f]));
  const read = (encoding: string, bytes: Uint8Array) => [encoding, fold(decodeText(bytes, encoding))] as const;
  const plain = ["gb18030", "big5", "euc-jp", "shift_jis", "euc-kr"].map((encoding) => read(encoding, pairs));
  // JIS X 0212 takes a third byte before the two (Encoding §12.1.1).
  return [...plain, read("euc-jp", triples)];
});

/** What each UTF-16 code unit is when it is folded, a line each. */
const foldedCharacters = lazily(() => {
  const units = Array.from({ length: 0x10000 }, (_, unit) => unit === LF ? "" : String.fromCharCode(unit));
  return fold(units.join("\n"));
});

/** A file from its beginning, of which all is there already if it is small. Others get their turn at each piece. */
async function* piecesOf(file: OpenFile, size: number, sample: Uint8Array): AsyncGenerator<Uint8Array> {
  if (size <= SEARCHED_PIECE) return yield sample;
  const buffer = new Uint8Array(SEARCHED_PIECE);
  for (let at = 0, count; at < size && (count = file.read(buffer, at)) > 0; at += count) {
    await yieldToOthers();
    yield buffer.subarray(0, Math.min(size - at, count));
  }
}

/** Text in blocks of whole lines, or of the pieces of a long one, which overlap: no word is cut. */
async function* blocksOf(
  search: Search,
  pieces: AsyncIterable<Uint8Array>,
  { type, encoding }: Nature,
): AsyncGenerator<string> {
  // Of text in an unknown charset, the ASCII can be searched.
  const decoder = new TextDecoder(encoding ?? "windows-1252");
  const visible = MARKUP_TYPE.test(type) ? markupReader() : (text: string) => text;
  let rest = "";
  for await (const piece of pieces) {
    search.bytes += piece.length;
    const text = rest + visible(decoder.decode(piece, { stream: true }), false), end = text.lastIndexOf("\n") + 1;
    yield end > 0 ? text.slice(0, end) : text;
    rest = end > 0 ? text.slice(end) : text.slice(-LINE_OVERLAP);
  }
  yield rest + visible(decoder.decode(), true);
}

/** How far the search in one text got. */
interface Scan {
  /** Words that were not met yet. */
  readonly missing: Set<string>;
  /** How many lines have been searched. */
  lines: number;
  /** The first line with most of the words, and how many it has. */
  line: TextLine | undefined;
  most: number;
}

function scanBlock(words: readonly string[], scan: Scan, block: string): void {
  const folded = fold(block);
  for (const word of scan.missing) {
    const at = folded.indexOf(word);
    if (at < 0) continue;
    scan.missing.delete(word);
    // Folding keeps line feeds.
    const start = folded.lastIndexOf("\n", at) + 1, index = countLines(folded.slice(0, start));
    const line = lineOf(block, index), whole = fold(line), most = words.filter((word) => whole.includes(word)).length;
    if (most <= scan.most) continue;
    scan.most = most;
    scan.line = { number: scan.lines + index + 1, text: excerpt(line, at - start) };
  }
  scan.lines += countLines(block);
}

function countLines(text: string): number {
  let count = 0;
  for (let at = text.indexOf("\n"); at >= 0; at = text.indexOf("\n", at + 1)) count++;
  return count;
}

function lineOf(text: string, index: number): string {
  let start = 0;
  for (let i = 0; i < index; i++) start = text.indexOf("\n", start) + 1;
  const end = text.indexOf("\n", start);
  return end < 0 ? text.slice(start) : text.slice(start, end);
}

/** What is shown of a line: what is around an index of its folded text. */
function excerpt(line: string, index: number): string {
  // Folding keeps the order of characters, but not their number: where is that in the line itself?
  let low = 0, high = line.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (fold(line.slice(0, middle + 1)).length > index) high = middle;
    else low = middle + 1;
  }
  const start = Math.max(0, Math.min(low - SNIPPET_START, line.length - SNIPPET_LENGTH)), end = start + SNIPPET_LENGTH;
  const cut = line.slice(start, end).replace(/^[\udc00-\udfff]|[\ud800-\udbff]$/g, "");
  return (start > 0 ? "…" : "") + cut.replace(/[\s\p{Cc}]+/gu, " ").trim() + (end < line.length ? "…" : "");
}

/** Letters whose case folding differs from their small form: ß is ss, and ς is σ. */
const OTHERWISE_FOLDED = /[ßı\u01f0\u0345\u0390\u03b0ς\u1c80-\u1c88\u1e96-\u1e99\u1f50-\u1ffc]/g;

/**
 * One form for all texts that are the same but for case, width, and the form of Unicode (UAX 15, NFKC). Line feeds stay, and
 * a longer text never becomes shorter: `scanBlock` and `excerpt` count on it.
 */
function fold(text: string): string {
  return text.normalize("NFKC").toLowerCase()
    .replace(OTHERWISE_FOLDED, (letter) => letter.toUpperCase().toLowerCase())
    // Turkish writes a dot on the capital, too.
    .replaceAll("i\u0307", "i");
}

/** Elements that may stand within a word. */
const INLINE_ELEMENTS: ReadonlySet<string> = new Set(
  `a abbr b bdi bdo big cite code del dfn em font i ins kbd mark nobr q rb ruby s samp small span strike strong sub sup
  tt u var wbr`.split(/\s+/),
);

/** Markup and character references of HTML and XML. A match with an empty group is cut: it may go on in the next piece. */
const MARKUP_TOKEN = new RegExp(
  [
    /<!\[CDATA\[|\]\]>/,
    /<!--[^]*?(?:-->|(?<comment>$))/,
    /<(?<hidden>script|style)(?![\w:.\-])(?:[^>]*\/>|[^]*?(?:<\/\k<hidden>\s*>|(?<script>$)))/,
    /<\/?(?<name>[a-z][^\s\/>]*)(?:[^>"'=]+|=\s*(?:"[^"]*(?:"|$)|'[^']*(?:'|$))?|["'])*(?:>|(?<tag>$))/,
    /<(?:[!?\/][^>]*(?:>|(?<other>$))|(?<bare>$))/,
    /&(?:#(?<decimal>\d{1,7})|#x(?<hex>[0-9a-f]{1,6})|(?<entity>[a-z][a-z0-9]{1,7}));|&[#\w]{0,9}(?<reference>$)/,
  ].map(({ source }) => source).join("|"),
  "gi",
);

/** The text of markup that comes in pieces: what readers see of it, with as many lines as before. */
function markupReader(): (piece: string, isLast: boolean) => string {
  let rest = "";
  return (piece, isLast) => {
    const whole = rest + piece;
    rest = "";
    return whole.replace(MARKUP_TOKEN, (token: string, ...matched) => {
      const groups = matched.at(-1) as Readonly<Record<string, string | undefined>>;
      const { comment, script, tag, other, bare, reference } = groups;
      const isCut = [comment, script, tag, other, bare, reference].includes("");
      if (!isCut) return meaningOf(token, groups);
      if (isLast) return reference === undefined ? "" : token;
      // Of a very long token, only the beginning and the end are kept.
      const isLong = token.length > SEARCHED_PIECE, skipped = isLong ? token.slice(64, -64) : "";
      rest = isLong ? token.slice(0, 64) + token.slice(-64) : token;
      return "\n".repeat(countLines(skipped));
    });
  };
}

/** The characters that a token of markup stands for: white space, where it separates what is around it. */
function meaningOf(
  token: string,
  { decimal, hex, entity, name }: Readonly<Record<string, string | undefined>>,
): string {
  if (entity !== undefined) return entities().get(entity) ?? token;
  const codePoint = decimal !== undefined ? Number(decimal) : hex !== undefined ? parseInt(hex, 16) : undefined;
  if (codePoint !== undefined) return codePoint > 0x10ffff ? "\ufffd" : String.fromCodePoint(codePoint).toWellFormed();
  const lines = "\n".repeat(countLines(token));
  return name !== undefined && INLINE_ELEMENTS.has(name.toLowerCase()) ? lines : lines || " ";
}

/** HTML §13.5: the names that pages have been written with; those from U+00A0 to U+00FF in that order. */
const entities = lazily((): ReadonlyMap<string, string> => {
  const latin = `nbsp iexcl cent pound curren yen brvbar sect uml copy ordf laquo not shy reg macr deg plusmn sup2 sup3
    acute micro para middot cedil sup1 ordm raquo frac14 frac12 frac34 iquest Agrave Aacute Acirc Atilde Auml Aring AElig
    Ccedil Egrave Eacute Ecirc Euml Igrave Iacute Icirc Iuml ETH Ntilde Ograve Oacute Ocirc Otilde Ouml times Oslash
    Ugrave Uacute Ucirc Uuml Yacute THORN szlig agrave aacute acirc atilde auml aring aelig ccedil egrave eacute ecirc
    euml igrave iacute icirc iuml eth ntilde ograve oacute ocirc otilde ouml divide oslash ugrave uacute ucirc uuml
    yacute thorn yuml`.split(/\s+/).map((name, i): [string, string] => [name, String.fromCharCode(0xa0 + i)]);
  const others =
    "amp& lt< gt> quot\" apos' ndash– mdash— lsquo‘ rsquo’ ldquo“ rdquo” hellip… bull• euro€ OElig\u0152 " +
    "oelig\u0153 Scaron\u0160 scaron\u0161 Yuml\u0178";
  return new Map([...latin, ...others.split(" ").map((each): [string, string] => [each.slice(0, -1), each.at(-1)!])]);
});

/** Results for programs. */
function jsonResults(): ResultForm {
  const result = ({ path, entry, line }: Hit, number: number) => {
    const { name, ...described } = describeForPrograms(entry);
    const found = { path: path.join("/"), name, ...described, ...(line && { line: line.number, snippet: line.text }) };
    return `${number > 0 ? "," : ""}\n ${JSON.stringify(found)}`;
  };
  return { start: "[", result, end: () => "\n]\n" };
}

/** Results for people. */
function pageResults(exchange: Exchange, { segments }: FolderFound, query: SearchQuery): ResultForm {
  const suffix = keptQuery(exchange, {}), list = '<ol class="results" aria-label="Results">';
  const [start, end] = pageHtml(
    `${query.text} – ${titleOf(exchange, segments)}`,
    `${headerHtml(exchange, segments, true)}
<main>${searchHtml(exchange, query)}
<p class="soft running">Results are shown as they are found. The last line says when the search is over.</p>
${list}</ol>
</main>`,
  ).split(list) as [string, string];
  return {
    start: start + list,
    result: (hit) => resultHtml(hit, query.words, suffix),
    end: (search) => end.replace("</ol>", () => `</ol>\n<p class="over" role="status">${summary(search)}</p>`),
  };
}

function resultHtml({ path, entry, line }: Hit, words: readonly string[], suffix: string): string {
  const links = path.map((name, i) => {
    const isLast = i === path.length - 1, slash = isLast && !entry.isFolder ? "" : "/";
    const href = path.slice(0, i + 1).map(encodeURIComponent).join("/") + slash + suffix;
    return `<a href="${href}" dir="auto">${isLast ? markWords(name, words) : escapeMarkup(name)}${slash}</a>`;
  });
  const size = entry.isFolder ? "" : `${sizeHtml(false, entry.size)}, `;
  const shown = line && `\n<p><small>Line ${line.number}</small> <bdi>${markWords(line.text, words)}</bdi></p>`;
  return `<li><p>${links.join(" ")} <small>${size}${timeHtml(entry.time)}</small></p>${shown ?? ""}</li>\n`;
}

/** What was searched, and why the search stopped early. */
function summary(search: Search): string {
  const { results, names, files, bytes, large, inText, started } = search, reason = stopReason(search);
  const count = (number: number, noun: string) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
  const text = inText ? `, and at ${formatSize(bytes)} of text in ${count(files, "file")}` : "";
  const time = ((performance.now() - started) / 1000).toFixed(2),
    found = results === 0 ? "Nothing was found" : count(results, "result");
  const end = reason === undefined ? "" : ` <strong>It stopped early: ${reason}.</strong>`;
  const passed = large === 0 ? "" : ` Files larger than ${formatSize(SEARCHED_FILE)} were passed over: ${large}.`;
  return `${found}. Looked at ${count(names, "name")}${text}, in ${time} s.${end}${passed}`;
}

/** Characters that are one when they are folded: with the marks that follow, and the syllables of Hangul. */
const cluster = lazily(() => /[^][\p{M}\uff9e\uff9f\u1160-\u11ff\u314f-\u3163]*/gu);

/** Text as markup, the words in it marked. */
function markWords(text: string, words: readonly string[]): string {
  const clusters = text.match(cluster()) ?? [], owners: number[] = [];
  let folded = "";
  for (const [i, cluster] of clusters.entries()) {
    folded += fold(cluster);
    while (owners.length < folded.length) owners.push(i);
  }
  const isMarked = new Set<number>();
  for (const word of words) {
    for (let at = folded.indexOf(word); at >= 0; at = folded.indexOf(word, at + 1)) {
      for (let i = at; i < at + word.length; i++) isMarked.add(owners[i]!);
    }
  }
  const marked = clusters.map((cluster, i) =>
    isMarked.has(i) ? `<mark>${escapeMarkup(cluster)}</mark>` : escapeMarkup(cluster)
  );
  return marked.join("").replaceAll("</mark><mark>", "");
}

/** The search box of every listing. What is typed comes in the charset of the page, and `_charset_` says which. */
function searchHtml(exchange: Exchange, { text, inText }: SearchQuery): string {
  return `<form class="search" role="search"><input type="hidden" name="_charset_">${keptFields(exchange)}
<label>Search below this folder <input type="search" name="q" maxlength="${QUERY_LENGTH}" value="${
    escapeMarkup(text)
  }"></label>
<label class="tick"><input type="checkbox" name="text" value="1"${
    inText ? " checked" : ""
  }> also in the text of files</label> <button>Search</button></form>`;
}

// ── The lab ──────────────────────────────────────────────────────────────────────────────────────
// What is served without ROOT: a page to look at charsets with, and their bytes for programs. The page
// has no script and may run none: under a false label any text could turn into markup.

const LAB_ROUTES: readonly Route[] = [
  [/^\/$/, handlePage, ["GET", "POST"]],
  [/^\/text$/, handleText, ["GET", "POST"]],
  [/^\/detect$/, handleDetect, ["POST"]],
  [/^\/diagnose$/, handleDiagnose, ["GET", "POST"]],
  [/^\/charsets$/, handleCharsets],
];

const GREETINGS: readonly (readonly [language: string, code: string, greeting: string])[] = [
  ["English", "en", "Hello, world"],
  ["简体中文", "zh-Hans", "你好，世界"],
  ["繁體中文", "zh-Hant", "您好，世界"],
  ["日本語", "ja", "こんにちは、世界"],
  ["한국어", "ko", "안녕하세요"],
  ["Русский", "ru", "Привет, мир"],
  ["Українська", "uk", "Привіт, світе"],
  ["Ελληνικά", "el", "Γειά σου, Κόσμε"],
  ["עברית", "he", "שלום עולם"],
  ["العربية", "ar", "مرحبا بالعالم"],
  ["ไทย", "th", "สวัสดีชาวโลก"],
  ["Tiếng Việt", "vi", "Xin chào thế giới"],
  ["Türkçe", "tr", "Günaydın dünya, şeker"],
  ["Polski", "pl", "Dzień dobry, świecie"],
  ["Français", "fr", "Ça va, cœur ?"],
  ["Cymraeg", "cy", "Ŵyn a ŷd"],
  ["Latviešu", "lv", "Sveika, pasaulē"],
  ["Íslenska", "is", "Góðan daginn, þú"],
  ["Esperanto", "eo", "Saluton, ĉiu ĝojo"],
  ["हिन्दी", "hi", "नमस्ते दुनिया"],
  ["Emoji", "zxx", "👋🌍"],
];

/** The charsets most often confused: they are shown first. */
const USUAL_SUSPECTS = [
  "utf-8",
  "windows-1252",
  "gbk",
  "big5",
  "shift_jis",
  "euc-jp",
  "euc-kr",
  "windows-1251",
  "koi8-r",
  "utf-16le",
];
/** Most characters that the tables of the page show. */
const SHOWN_CHARACTERS = 48;

/** What charsets are for. */
const PURPOSES = lazily(() =>
  new Map(
    `utf-8 all of Unicode;utf-16le Unicode, two bytes each;utf-16be Unicode, two bytes each;gbk simplified Chinese
    gb18030 simplified Chinese, all of Unicode;big5 traditional Chinese;shift_jis Japanese, Windows
    euc-jp Japanese, Unix;iso-2022-jp Japanese, mail;euc-kr Korean;windows-1252 Western European
    iso-8859-15 Western European with €;macintosh Western European, old Macs;windows-1250 Central European
    iso-8859-2 Central European, Unix;iso-8859-16 South-Eastern European;windows-1251 Cyrillic;koi8-r Russian, Unix
    koi8-u Ukrainian, Unix;iso-8859-5 Cyrillic, seldom;ibm866 Russian, DOS;x-mac-cyrillic Cyrillic, old Macs
    windows-1253 Greek;iso-8859-7 Greek, Unix;windows-1254 Turkish;windows-1255 Hebrew;iso-8859-8 Hebrew, left to right
    iso-8859-8-i Hebrew, Unix;windows-1256 Arabic;iso-8859-6 Arabic, seldom;windows-1257 Baltic;iso-8859-4 Baltic, old
    iso-8859-13 Baltic, Unix;windows-1258 Vietnamese;windows-874 Thai;iso-8859-3 Maltese, Esperanto
    iso-8859-10 Nordic;iso-8859-14 Celtic;x-user-defined bytes as private characters`
      .split(/[;\n]/).map((row) => row.trim().split(/ (.*)/) as [string, string]),
  )
);

/** A charset's name, and what it is for. */
function nameAndPurpose(charset: string): string {
  const purpose = PURPOSES().get(charset);
  return purpose === undefined ? charset : `${charset}: ${purpose}`;
}

/** What the form of the page sent: in its query, or as content if that is long or a file. */
interface SentForm {
  readonly fields: URLSearchParams;
  readonly file: Uint8Array<ArrayBuffer> | undefined;
}

async function readForm(incoming: Incoming): Promise<SentForm> {
  if (incoming.method !== "POST") return { fields: incoming.query, file: undefined };
  const type = incoming.header("content-type") ?? "";
  if (essenceOf(type) !== "multipart/form-data") return { fields: await incoming.form(), file: undefined };
  // The platform reads a form's text as UTF-8: written as one character each, the bytes come through unchanged.
  const content = UTF8_ENCODER.encode(latin1(await incoming.bytes()));
  const form = await new Response(content, { headers: { "Content-Type": type } }).formData().catch((cause) => {
    throw new HttpError(400, `Cannot parse the form: ${(cause as Error).message}`);
  });
  const texts = [...form].filter((entry): entry is [string, string] => typeof entry[1] === "string");
  const bytes = texts.map(([name, value]) => [name, latin1Bytes(value)] as const), file = form.get("file");
  const isGiven = file instanceof File && file.size > 0;
  return {
    fields: decodeForm(bytes, incoming.charset),
    file: isGiven ? latin1Bytes(UTF8_DECODER.decode(await file.bytes())) : undefined,
  };
}

/** `GET /`, `POST /`: the page. It shows the head of its own response, so its text is made when that is known. */
async function handlePage(incoming: Incoming): Promise<Answer> {
  const { fields, file } = await readForm(incoming), declare = readParameter(fields, "declare", labelOption);
  const charset = readParameter(fields, "charset", encodingOption) ?? incoming.charset;
  const readings = file === undefined ? [] : detectAll(file), [likeliest] = readings;
  const given = file === undefined ? fields.get("text") : decodeText(file, likeliest?.charset ?? "utf-8");
  const text = (given ?? sampleOf(charset).split(" / ")[1] ?? "Hello").replaceAll("\r\n", "\n");
  async function* body() {
    const { headText: requestHead, responseHead = "" } = incoming;
    const html = labHtml({ text, isGiven: given !== null, charset, declare, readings, requestHead, responseHead });
    yield await Promise.resolve(encode(html, charset));
  }
  return {
    type: "text/html",
    charset,
    ...(declare && { declare }),
    headers: { "Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-store" },
    body: body(),
  };
}

/** What the page is about. */
interface Experiment {
  readonly text: string;
  /** Whether the text is the client's, not our example. */
  readonly isGiven: boolean;
  readonly charset: string;
  readonly declare: string | undefined;
  /** What a file that was sent may be in. */
  readonly readings: readonly Detection[];
  readonly requestHead: string;
  readonly responseHead: string;
}

function labHtml(experiment: Experiment): string {
  const { text, isGiven, charset, declare, readings } = experiment;
  const falsely = declare !== undefined && declare !== "none" &&
    !(LABELS.includes(declare) && encodingOf(declare) === charset);
  const shownDeclare = falsely ? ` and declared as <strong>${escapeMarkup(declare)}</strong>` : "";
  const truth = `<p class="notice"><a href="?${
    labQuery({ text: shownPart(text), charset })
  }">Declare the true charset again</a></p>`;
  return pageHtml(
    `charserve: ${charset}`,
    `<header>
<h1>The charset lab</h1>
<p>This page was sent in <strong>${charset}</strong>${shownDeclare}. Text is sent as bytes, with the name of the charset to read them in. When the name is wrong, the text is garbled.</p>
${declare === undefined ? "" : truth}
</header>
<main>
${labForm(experiment)}
${readings.length > 0 ? labDetection(readings) : labDiagnosis(text, isGiven)}
${labCharacters(text, charset)}
${labReadings(text, charset)}
${labGreetings(charset)}
${labWire(experiment)}
</main>
<footer><p>For programs: <a href="text?${
      labQuery({ text: shownPart(text), charset })
    }">this text alone</a>, <a href="charsets">all charsets as JSON</a>.</p></footer>`,
  );
}

function labGreetings(charset: string): string {
  const lacks = charset.startsWith("utf-")
    ? ""
    : `<p>What ${charset} lacks was sent as a character reference: you can read it, but it costs up to eight times the bytes.</p>\n`;
  const greetings = GREETINGS.map(([language, code, greeting]) =>
    `<div><dt>${language}</dt><dd lang="${code}"><bdi>${greeting}</bdi></dd></div>`
  );
  return `<section aria-labelledby="greetings"><h2 id="greetings">Greetings</h2>
${lacks}<dl class="greetings">${greetings.join("\n")}</dl></section>`;
}

/** What of a text fits into a link. */
function shownPart(text: string): string {
  return shownCharacters(text).join("");
}

/** A query of the page, in the form that is read whatever the charset. */
function labQuery(parameters: Readonly<Record<string, string>>): string {
  return escapeMarkup(new URLSearchParams({ ...parameters, _charset_: "utf-8" }).toString());
}

function labForm({ text, charset, declare }: Experiment): string {
  const options = (chosen: string | undefined) =>
    [...encodings().keys()].map((name) =>
      `<option value="${name}"${name === chosen ? " selected" : ""}>${nameAndPurpose(name)}</option>`
    ).join("");
  return `<form class="card" action="./" method="post" enctype="multipart/form-data" aria-label="Experiment">
<input type="hidden" name="_charset_">
<label class="wide">Text <textarea name="text" rows="3" spellcheck="false">\n${escapeMarkup(text)}</textarea></label>
<label class="wide">or a file, to find out its charset <input type="file" name="file"></label>
<label>Sent in <select name="charset">${options(charset)}</select></label>
<label>Declared as <select name="declare"><option value="">the truth</option><option value="none"${
    declare === "none" ? " selected" : ""
  }>nothing</option>${options(declare)}</select></label>
<button class="wide">Send it</button>
</form>`;
}

/** The characters of a text, at most `SHOWN_CHARACTERS`. */
function shownCharacters(text: string): string[] {
  return Array.from(text.toWellFormed().slice(0, SHOWN_CHARACTERS * 2)).slice(0, SHOWN_CHARACTERS);
}

function labCharacters(text: string, charset: string): string {
  const rows = shownCharacters(text).map((character) => {
    const codePoint = character.codePointAt(0)!, { bytes, lost } = encodeText(character, charset, "html");
    const sent = lost === 0 ? hex(bytes) : `<mark>not in ${charset}</mark>, sent as ${escapeMarkup(latin1(bytes))}`;
    return `<tr><td class="char"><bdi>${visible(character)}</bdi></td><td><code>${
      codePointName(codePoint)
    }</code></td><td>${scriptOf(character)}</td><td class="bytes">${sent}</td></tr>`;
  });
  const head =
    `<thead><tr><th scope="col">Character<th scope="col">Code point<th scope="col">Script<th scope="col">Bytes in ${charset}</thead>`;
  return `<section aria-labelledby="characters"><h2 id="characters">Characters and bytes</h2>
${scrollable("characters", `${head}<tbody>${rows.join("\n")}</tbody>`)}</section>`;
}

/** A character as markup that shows it: pictures for the controls. */
function visible(character: string): string {
  const code = character.charCodeAt(0);
  return code <= 0x20 ? `&#${0x2400 + code};` : code === 0x7f ? "&#x2421;" : escapeMarkup(character);
}

const SCRIPTS =
  `Latin Han Hiragana Katakana Hangul Cyrillic Greek Arabic Hebrew Thai Devanagari Bopomofo Armenian Georgian Bengali
  Tamil Telugu Kannada Malayalam Gujarati Gurmukhi Sinhala Khmer Lao Myanmar Tibetan Mongolian Ethiopic Cherokee Braille Yi`
    .split(/\s+/);
/** What else a character may be, and the property that says so. */
const CATEGORIES =
  `Letter:L Mark:M Digit:Nd Number:N Punctuation:P Currency:Sc Emoji:Extended_Pictographic Symbol:S Space:Z Control:Cc
  Private_use:Co`.split(/\s+/).map((category) => category.split(":"));

/** Names of kinds of characters, with the patterns that tell them. */
const characterKinds = lazily(() => [
  ...SCRIPTS.map((script) => [script, new RegExp(`\\p{Script=${script}}`, "u")] as const),
  ...CATEGORIES.map(([name, property]) => [name!.replace("_", " "), new RegExp(`\\p{${property}}`, "u")] as const),
]);

/** The script of a character, or what kind it is. */
function scriptOf(character: string): string {
  return characterKinds().find(([, pattern]) => pattern.test(character))?.[0] ?? "Other";
}

/** How the bytes of a text read in every other charset. */
function labReadings(text: string, charset: string): string {
  const shown = shownCharacters(text).join(""), bytes = encode(shown, charset);
  const others = [...encodings().keys()].filter((name) => !USUAL_SUSPECTS.includes(name));
  const table = (names: readonly string[]) => {
    const rows = names.filter((name) => name !== charset).map((name) => {
      const reading = readingHtml(decodeText(bytes, name));
      const link = `<a href="?${labQuery({ text: shownPart(text), charset, declare: name })}">${name}</a>`;
      return `<tr><th scope="row">${link}</th><td class="text"><bdi>${reading}</bdi></td></tr>`;
    });
    return scrollable(
      "readings",
      `<thead><tr><th scope="col">Read as<th scope="col">Text</thead><tbody>${rows.join("\n")}</tbody>`,
    );
  };
  return `<section aria-labelledby="readings"><h2 id="readings">How it reads in other charsets</h2>
<p class="bytes">${hex(bytes)}</p>
<p>These are the bytes just sent, and this is what they look like in other charsets. Follow a name, and your own browser makes that mistake.</p>
${table(USUAL_SUSPECTS)}<details><summary>In the ${others.length} other charsets</summary>${
    table(others)
  }</details></section>`;
}

/** A table that a narrow window can scroll, with the keyboard too; `label` is the id of what names it. */
function scrollable(label: string, table: string): string {
  return `<div class="scroll" tabindex="0" role="group" aria-labelledby="${label}"><table>${table}</table></div>`;
}

/** Control characters of a reading as visible pictures, so that they have no effect. */
function controlPictures(text: string): string {
  // deno-lint-ignore no-control-regex
  return text.replace(/[\x00-\x1f]/g, (control) => `&#${0x2400 + control.charCodeAt(0)};`).replace(
    /[\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g,
    "<mark>&#xB7;</mark>",
  );
}

/** What the lines of a head say, for those who see one for the first time. */
const LINE_NOTES: readonly (readonly [line: RegExp, note: string])[] = [
  [/^[A-Z]+ \S+ HTTP\//, "the request line: method, target, version (RFC 9112 §3)"],
  [/^HTTP\//, "the status line: version, status code, reason (RFC 9112 §4)"],
  [/^Host:/i, "which of the sites at this address is meant (RFC 9110 §7.2)"],
  [/^User-Agent:/i, "the program that asks (RFC 9110 §10.1.5)"],
  [/^Accept:/i, "media types it would like (RFC 9110 §12.5.1)"],
  [/^Accept-Charset:/i, "charsets it would like (RFC 9110 §12.5.2)"],
  [/^Accept-Encoding:/i, "compressions it can undo (RFC 9110 §12.5.3)"],
  [/^Accept-Language:/i, "languages its user reads (RFC 9110 §12.5.4)"],
  [/^Connection: close/i, "the last message of this connection (RFC 9112 §9.6)"],
  [/^Connection:/i, "wishes about this connection alone (RFC 9110 §7.6.1)"],
  [/^Referer:/i, "the page that led here (RFC 9110 §10.1.3)"],
  [/^Cookie:/i, "what a server of this host asked it to keep (RFC 6265 §5.4)"],
  [/^Upgrade-Insecure-Requests:/i, "it would prefer HTTPS (Upgrade Insecure Requests §3.2)"],
  [/^Sec-Fetch/i, "who asks, and what for (Fetch Metadata §2)"],
  [/^Sec-CH/i, "what the browser tells of itself (RFC 8942)"],
  [/^If-/i, "only if this holds (RFC 9110 §13.1)"],
  [/^Cache-Control:/i, "what caches may do with it (RFC 9111 §5.2)"],
  [/^Date:/i, "when this was said (RFC 9110 §6.6.1)"],
  [/^Content-Type:/i, "what the content is, and the charset it is declared to be in (RFC 9110 §8.3)"],
  [/^Content-Length:/i, "how many bytes of content follow (RFC 9110 §8.6)"],
  [
    /^Transfer-Encoding:/i,
    "the content comes in chunks, each with its size: nobody knew the length when this was sent (RFC 9112 §7.1)",
  ],
  [/^Content-Security-Policy:/i, "no script may run here, whatever the bytes turn into (CSP 3)"],
  [/^X-Content-Type-Options:/i, "do not guess another type (Fetch §3.6)"],
  [/^Vary:/i, "fields of the request that the answer depended on (RFC 9110 §12.5.5)"],
  [/^$/, "an empty line: here the head ends"],
];

function labWire({ requestHead, responseHead }: Experiment): string {
  const table = (id: string, title: string, head: string) => {
    const rows = head.split("\r\n").slice(0, -1).map((line) => {
      const note = LINE_NOTES.find(([pattern]) => pattern.test(line))?.[1] ?? "";
      return `<tr><td class="text"><code>${
        escapeMarkup(escapeWire(line))
      }</code></td><td><small>${note}</small></td></tr>`;
    });
    return scrollable(id, `<caption id="${id}">${title}</caption><tbody>${rows.join("\n")}</tbody>`);
  };
  return `<section aria-labelledby="wire"><h2 id="wire">On the wire</h2>
<p>The head of the request that your browser sent for this page, and the head of the answer. <code>--log wire</code> shows the same in the terminal.</p>
${table("request-head", "The request, as it came", requestHead)}
${table("response-head", "The response, as it went", responseHead)}</section>`;
}

/** `GET /diagnose`, `POST /diagnose`: what garbled a text, for programs. */
async function handleDiagnose(incoming: Incoming): Promise<Answer> {
  const text = incoming.method === "POST" ? await incoming.text() : incoming.query.get("text") ?? "";
  return { type: "application/json", body: JSON.stringify(diagnose(text), null, 1) + "\n" };
}

/** A charset that bytes may be in. */
interface Detection {
  readonly charset: string;
  readonly text: string;
  /** From 0 to 1: how likely it is, compared with the others. */
  readonly confidence: number;
}

/** Most readings reported, and how much of the text of each, in characters. */
const TOLD_READINGS = 8, TOLD_LENGTH = 1000;

/** `POST /detect`: the charsets that bytes may be in, likeliest first, for programs. */
async function handleDetect(incoming: Incoming): Promise<Answer> {
  return { type: "application/json", body: JSON.stringify(detectAll(await incoming.bytes()), null, 1) + "\n" };
}

function detectAll(bytes: Uint8Array): Detection[] {
  const told = (charset: string, confidence: number): Detection => ({
    charset,
    text: decodeText(bytes, charset).slice(0, TOLD_LENGTH).toWellFormed(),
    confidence: Math.round(confidence * 1000) / 1000,
  });
  const said = evidentEncoding(bytes, "text/html");
  // What bytes prove of themselves needs no comparison; a declaration may be wrong, but browsers believe it.
  const readings = detect(bytes).filter(({ encoding }) => encoding !== said).slice(0, TOLD_READINGS);
  if (said !== undefined) return [told(said, 1), ...readings.map(({ encoding }) => told(encoding, 0))];
  const [best] = readings, shares = readings.map(({ bits }) => 2 ** (best!.bits - bits));
  const sum = shares.reduce((a, b) => a + b, 0);
  return readings.map(({ encoding }, i) => told(encoding, shares[i]! / sum));
}

function labDetection(readings: readonly Detection[]): string {
  const rows = readings.map(({ charset, text, confidence }) =>
    `<tr><th scope="row">${charset}</th><td class="number">${
      Math.round(confidence * 100)
    } %</td><td class="text"><bdi>${readingHtml(shownPart(text))}</bdi></td></tr>`
  );
  const head = `<thead><tr><th scope="col">Charset<th scope="col">How sure<th scope="col">It reads</thead>`;
  return `<section aria-labelledby="detection"><h2 id="detection">Which charset is the file in?</h2>
<p>Likeliest first. The text above is the file, read in the first of these.</p>
${scrollable("detection", `${head}<tbody>${rows.join("\n")}</tbody>`)}</section>`;
}

/** Text as markup, with what cannot be read marked. */
function readingHtml(text: string): string {
  return controlPictures(escapeMarkup(text)).replaceAll("\uFFFD", "<mark>&#xFFFD;</mark>");
}

function labDiagnosis(text: string, isGiven: boolean): string {
  const diagnoses = isGiven ? diagnose(text) : [];
  const rows = diagnoses.map(({ steps, text, lost, note }) => {
    const way = note ?? steps.map(({ written, read }) => `${written} read as ${read}`).join(", then ");
    const loss = lost === 0
      ? ""
      : ` <small>${lost} ${lost === 1 ? "character is" : "characters are"} lost for good</small>`;
    return `<tr><td class="text"><bdi>${readingHtml(text)}</bdi>${loss}</td><td>${way}</td></tr>`;
  });
  const head = `<thead><tr><th scope="col">It was<th scope="col">What happened</thead>`;
  return `<section aria-labelledby="diagnosis"><h2 id="diagnosis">What went wrong?</h2>
${
    rows.length === 0
      ? "<p>This text looks fine as it is. Paste garbled text above to see which charsets were mixed up.</p>"
      : `<p>If the text is garbled, this may have happened to it, likeliest first.</p>${
        scrollable("diagnosis", `${head}<tbody>${rows.join("\n")}</tbody>`)
      }`
  }</section>`;
}

/** `GET /text`, `POST /text`: the text alone, so encoded and so labelled, in as many places as asked. */
async function handleText(incoming: Incoming): Promise<Answer> {
  const { query, charset } = incoming, get = (name: string) => query.get(name) || undefined;
  const text = incoming.method === "POST" ? await incoming.text() : get("text") ?? "";
  const type = readParameter(query, "type", mediaTypeOption) ?? "text/plain";
  const chunkSize = numberParameter(query, "chunk", 1, 65536), delay = numberParameter(query, "delay", 0, 10_000);
  const mode = readParameter(query, "unmappable", oneOf("auto", "html", "replacement", "fatal")) ?? "auto";
  const declare = readParameter(query, "declare", labelOption), meta = readParameter(query, "meta", labelOption);
  const mark = query.has("bom") ? byteOrderMark(get("bom") ?? "1", charset) : NO_BYTES;
  const { bytes } = encodeText(declarationText(type, meta) + text, charset, unmappableFor(mode, type));
  const body = concat([mark, bytes]);
  if (delay) await pause(delay);
  return {
    status: numberParameter(query, "status", 200, 599) ?? 200,
    type,
    charset,
    body,
    ...(chunkSize !== undefined && { chunkSize }),
    ...(declare && { declare }),
    headers: { "Content-Security-Policy": "sandbox; " + PAGE_POLICY, Vary: "Accept-Charset" },
  };
}

/** `bom=1`: the mark of the text's own charset; `bom=utf-16le`: that of another. */
function byteOrderMark(wanted: string, charset: string): Uint8Array {
  const encoding = wanted === "1" ? charset : readLabel(wanted);
  const { bytes, lost } = encodeText("\uFEFF", encoding, "replacement");
  if (lost > 0) throw new HttpError(400, `${encoding} has no byte-order mark`);
  return bytes;
}

/** What a document of that type writes to declare a charset within itself. */
function declarationText(type: string, label: string | undefined): string {
  if (label === undefined) return "";
  if (type === "text/html") return `<!DOCTYPE html><meta charset="${label}">`;
  if (type === "text/css") return `@charset "${label}";\n`;
  if (/xml$/.test(type)) return `<?xml version="1.0" encoding="${label}"?>\n`;
  throw new HttpError(400, "meta is for type=html, xml and css");
}

const TEXT_SHORTHANDS: ReadonlyMap<string, string> = new Map([
  ["plain", "text/plain"],
  ["html", "text/html"],
  ["xml", "application/xml"],
  ["css", "text/css"],
  ["csv", "text/csv"],
  ["json", "application/json"],
  ["js", "text/javascript"],
]);

function mediaTypeOption(text: string): string {
  const type = TEXT_SHORTHANDS.get(text) ?? text.toLowerCase();
  if (MEDIA_TYPE.test(type)) return type;
  throw new UsageError("expected a media type such as text/html, or html");
}

/** `GET /charsets`: all charsets, for programs. */
function handleCharsets(): Answer {
  const charsets = [...encodings()].map(([name, labels]) => {
    const sample = sampleOf(name);
    return { name, labels, kind: kindOf(name), sample, bytes: hex(encode(sample, name)) };
  });
  return { type: "application/json", body: JSON.stringify(charsets, null, 2) + "\n" };
}

function kindOf(encoding: string): "unicode" | "multi-byte" | "single-byte" {
  return encoding.startsWith("utf-") ? "unicode" : isMultiByte(encoding) ? "multi-byte" : "single-byte";
}

/** The greetings that a charset can write, without loss. */
function sampleOf(encoding: string): string {
  return GREETINGS.map(([, , greeting]) => greeting)
    .filter((greeting) => encodeText(greeting, encoding, "html").lost === 0).join(" / ");
}

function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
}

// ── Vocabulary ───────────────────────────────────────────────────────────────────────────────────
// The words that several sections speak: fields, tokens, dates, qualities, statuses; values as people type them.

type Field = readonly [name: string, value: string];

/** RFC 9110 §5.6.2. */
const TOKEN = /^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/;
/** RFC 9110 §5.1 and §5.5: what may stand in one line, without the white space around the value. */
const FIELD_LINE =
  /^(?<name>[!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*(?<value>[\x21-\x7e\x80-\xff]?|[\x21-\x7e\x80-\xff][\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])[ \t]*$/;
/** RFC 9110 §8.3.1, without parameters. */
const MEDIA_TYPE = /^[!#$%&'*+\-.^_`|~0-9A-Za-z]+\/[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/;
/** RFC 3986 §3.2.2, without a port: a name, an IPv4 address, or an IPv6 address in brackets. */
const HOST = /^(?:[0-9A-Za-z\-._~!$&'()*+,;=%]+|\[[0-9A-Fa-f:.]+\])$/;

// deno-fmt-ignore
const REASONS: Readonly<Record<number, string>> = {
  200: "OK", 201: "Created", 202: "Accepted", 204: "No Content", 205: "Reset Content",
  206: "Partial Content", 301: "Moved Permanently", 302: "Found", 303: "See Other", 304: "Not Modified",
  307: "Temporary Redirect", 308: "Permanent Redirect", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden",
  404: "Not Found", 405: "Method Not Allowed", 406: "Not Acceptable", 408: "Request Timeout", 409: "Conflict",
  410: "Gone", 411: "Length Required", 412: "Precondition Failed", 413: "Content Too Large", 414: "URI Too Long",
  415: "Unsupported Media Type", 416: "Range Not Satisfiable", 417: "Expectation Failed", 418: "I'm a Teapot",
  421: "Misdirected Request", 422: "Unprocessable Content", 425: "Too Early", 426: "Upgrade Required",
  428: "Precondition Required", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
  451: "Unavailable For Legal Reasons", 500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway",
  503: "Service Unavailable", 504: "Gateway Timeout", 505: "HTTP Version Not Supported",
};

/**
 * An error that is an answer, such as 404. Any stage, and any handler, may throw it; the exchange
 * turns it into a small page. The message is shown to the client.
 */
export class HttpError extends Error {
  /** Status code of RFC 9110 §15, from 400 to 599. */
  readonly status: number;
  /** Fields that the response must carry, `Allow` of a 405 say. */
  readonly fields: readonly (readonly [name: string, value: string])[];

  /** Makes an error for `status`, explained to the client by `message`, to the log by `options.cause`. */
  constructor(
    status: number,
    message: string,
    fields: readonly (readonly [name: string, value: string])[] = [],
    options?: ErrorOptions,
  ) {
    super(message, options);
    if (!(status >= 400 && status <= 599)) throw new TypeError(`Cannot send status ${status} as an error`);
    this.name = "HttpError";
    this.status = status;
    this.fields = fields.map(([name, value]) => checkField(name, value));
  }
}

/** Nobody can say where the request ends and the next one begins: it is answered, and the connection closed. */
class FramingError extends HttpError {}

function errorText(error: unknown): string {
  return error instanceof Error ? `${error.name}: ${error.message}` : String(error);
}

/** RFC 9110 §5.6.7: `toUTCString` happens to be the IMF-fixdate that HTTP wants. */
function formatDate(time: number): string {
  return new Date(time).toUTCString();
}

/** What is made of the time in milliseconds, once a second: within a second, it is the same string. */
function onceASecond(make: (time: number) => string): () => string {
  let last = 0, made = "";
  return () => {
    const now = Date.now(), second = Math.trunc(now / 1000);
    if (second !== last) [last, made] = [second, make(now)];
    return made;
  };
}

/** A field that is one line, whatever a handler put into it (RFC 9110 §5.5: response splitting). */
function checkField(name: string, value: string): Field {
  if (TOKEN.test(name) && /^[\t\x20-\x7e\x80-\xff]*$/.test(value)) return [name, value];
  throw new TypeError(`Cannot send field "${name}": "${value}"`);
}

const MONTHS = "JanFebMarAprMayJunJulAugSepOctNovDec";
const HTTP_DATES = [
  /^\w{3}, (?<day>\d\d) (?<month>\w{3}) (?<year>\d{4}) (?<h>\d\d):(?<m>\d\d):(?<s>\d\d) GMT$/, // IMF-fixdate
  /^\w{6,9}, (?<day>\d\d)-(?<month>\w{3})-(?<year>\d\d) (?<h>\d\d):(?<m>\d\d):(?<s>\d\d) GMT$/, // RFC 850
  /^\w{3} (?<month>\w{3}) (?<day>[\d ]\d) (?<h>\d\d):(?<m>\d\d):(?<s>\d\d) (?<year>\d{4})$/, // asctime
];

/** The three forms of RFC 9110 §5.6.7, as milliseconds; NaN for anything else. */
function parseDate(text: string): number {
  for (const form of HTTP_DATES) {
    const part = form.exec(text)?.groups;
    if (part === undefined) continue;
    const month = MONTHS.indexOf(part.month!) / 3, [day, h, m, s] = [part.day, part.h, part.m, part.s].map(Number);
    let year = Number(part.year);
    // A year of two digits is the nearest that is less than 50 years ahead.
    if (part.year!.length === 2) {
      const now = new Date().getUTCFullYear();
      year += now - now % 100;
      if (year > now + 50) year -= 100;
    }
    const time = Date.UTC(year, month, day, h, m, s);
    const sound = Number.isInteger(month) && new Date(time).getUTCDate() === day && h! < 24 && m! < 60 && s! < 61;
    return sound ? time : NaN;
  }
  return NaN;
}

/** What tells content from other content in an entity tag (RFC 9110 §8.8.3). */
async function digestOfBytes(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)).subarray(0, 12).toHex();
}

/** Text without the white space of HTTP at its ends (RFC 9110 §5.6.3); in linear time, unlike a pattern. */
function trimSpace(text: string): string {
  let start = 0, end = text.length;
  while (start < end && (text[start] === " " || text[start] === "\t")) start++;
  while (start < end && (text[end - 1] === " " || text[end - 1] === "\t")) end--;
  return text.slice(start, end);
}

/** The members of a comma-separated list (RFC 9110 §5.6.1), trimmed, without the empty ones. */
function parseList(value: string): string[] {
  return value.split(",").map(trimSpace).filter((member) => member !== "");
}

const QUALITY = /^q=(?<quality>0(?:\.\d{0,3})?|1(?:\.0{0,3})?)$/i;

/** An `Accept…` field (RFC 9110 §12.4.2): what is accepted, in lower case, with its quality; malformed members are ignored. */
function parseAccept(value: string): Map<string, number> {
  const qualities = new Map<string, number>();
  for (const member of parseList(value)) {
    const [item, ...parameters] = member.split(";").map(trimSpace);
    const weight = parameters.find((parameter) => /^q=/i.test(parameter)) ?? "q=1";
    const quality = QUALITY.exec(weight)?.groups?.quality;
    if (item && quality !== undefined) qualities.set(item.toLowerCase(), Number(quality));
  }
  return qualities;
}

/** The media type of a Content-Type, without its parameters, in lower case (RFC 9110 §8.3.1). */
function essenceOf(contentType: string): string {
  return trimSpace(contentType.split(";", 1)[0]!).toLowerCase();
}

/** Thrown for what a person typed wrongly; ends in one line on standard error. */
class UsageError extends Error {}

function integer(least: number, most: number) {
  return (text: string): number => {
    const value = /^\d{1,9}$/.test(text) ? Number(text) : NaN;
    if (value >= least && value <= most) return value;
    throw new UsageError(`expected a whole number from ${least} to ${most}`);
  };
}

function oneOf<const W extends string>(...words: W[]) {
  return (text: string): W => {
    if (words.includes(text as W)) return text as W;
    throw new UsageError(`expected ${words.join(", ")}${didYouMean(text, words)}`);
  };
}

/** A label need not exist to be declared: testers want wrong ones. It must only be a token. */
function labelOption(text: string): string {
  if (TOKEN.test(text)) return text;
  throw new UsageError("expected a label such as gbk, or none");
}

function encodingOption(text: string): string {
  try {
    return encodingOf(text);
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
}

/** The candidate that the fewest edits lead to, if they are no more than `most`. */
function nearest(typed: string, candidates: readonly string[], most: number): string | undefined {
  let best: string | undefined, least = most;
  for (const candidate of candidates) {
    const distance = editDistance(typed, candidate);
    if (distance <= least && (distance < least || best === undefined)) [best, least] = [candidate, distance];
  }
  return best;
}

/** Insertions, removals, replacements and swaps of neighbours that make `a` into `b`. */
function editDistance(a: string, b: string): number {
  let [before, last] = [[] as number[], Array.from({ length: b.length + 1 }, (_, j) => j)];
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const change = a[i - 1] === b[j - 1] ? 0 : 1;
      row[j] = Math.min(last[j]! + 1, row[j - 1]! + 1, last[j - 1]! + change);
      if (a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) row[j] = Math.min(row[j]!, before[j - 2]! + 1);
    }
    [before, last] = [last, row];
  }
  return last[b.length]!;
}

/** `, did you mean X?` for the candidate with the least edit distance, if one is near. */
function didYouMean(typed: string, candidates: readonly string[]): string {
  if (typed.length > 40) return ""; // Too long for a slip, and slow to compare.
  const near = nearest(typed.toLowerCase(), candidates, Math.floor(typed.length / 3));
  return near === undefined ? "" : `, did you mean ${near}?`;
}

/** A parameter of a query, read as an option is; undefined if absent. Throws 400. */
function readParameter<T>(query: URLSearchParams, name: string, read: (text: string) => T): T | undefined {
  const text = query.get(name);
  if (text === null || text === "") return undefined;
  try {
    return read(text);
  } catch (error) {
    throw new HttpError(400, `${name}: ${(error as Error).message}`);
  }
}

/** A whole number of a query; undefined if absent. Throws 400. */
function numberParameter(query: URLSearchParams, name: string, least: number, most: number): number | undefined {
  return readParameter(query, name, integer(least, most));
}

/** Text with the characters escaped that mean something in markup. */
function escapeMarkup(text: string): string {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

/** Text that is safe on a terminal and in one line of a log: no control characters, none that change its direction. */
function escapeControls(text: string): string {
  // deno-lint-ignore no-control-regex
  return text.replace(/[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]/g, (character) => {
    const code = character.charCodeAt(0);
    return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16)}`;
  });
}

/** The same for text that is still bytes: everything but printable ASCII. */
function escapeWire(text: string): string {
  return text.replace(/[^\x20-\x7e]/g, (byte) => `\\x${byte.charCodeAt(0).toString(16).padStart(2, "0")}`);
}

const UTF8_ENCODER = new TextEncoder(), UTF8_DECODER = new TextDecoder("utf-8", { ignoreBOM: true });

/** Bytes as text, one character a byte: how heads are read and written (RFC 9112 §2.2). */
function latin1(bytes: Uint8Array): string {
  // Nearly always it is ASCII, which the platform's UTF-8 decoder reads fastest; what is not would come
  // out shorter, or with U+FFFD in it.
  const text = UTF8_DECODER.decode(bytes);
  if (text.length === bytes.length && !text.includes("\uFFFD")) return text;
  let exact = "";
  for (let at = 0; at < bytes.length; at += 4096) {
    // Spread syntax would iterate over the bytes one by one.
    exact += Reflect.apply(String.fromCharCode, undefined, bytes.subarray(at, at + 4096));
  }
  return exact;
}

/** The opposite of `latin1`. */
function latin1Bytes(text: string): Uint8Array<ArrayBuffer> {
  const bytes = allocate(text.length);
  writeLatin1(text, bytes);
  return bytes;
}

function writeLatin1(text: string, bytes: Uint8Array): void {
  // ASCII is the same in UTF-8. (Deno 2.6 comes to miscount what `encodeInto` wrote: only what is known before counts.)
  if (!/[\x80-\xff]/.test(text)) UTF8_ENCODER.encodeInto(text, bytes);
  else for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
}

// ── Memory and time ──────────────────────────────────────────────────────────────────────────────
// What is kept and for how long, buffers, and turns for work that takes long: it serves every section above.

/** Size of a shared buffer, in bytes. All of it stays in memory as long as any part of it is in use. */
const SLAB_SIZE = 32 * 1024;
/** Small buffers are cut from a larger one, since each of its own would cost more than what is written into it. */
let slab = new Uint8Array(0);

/** A new buffer of that length; what it contains is for the caller to write. */
function allocate(length: number): Uint8Array<ArrayBuffer> {
  if (length > 4096) return new Uint8Array(length);
  if (length > slab.length) slab = new Uint8Array(SLAB_SIZE);
  const bytes = slab.subarray(0, length);
  slab = slab.subarray(length);
  return bytes;
}

/** The same bytes, in a buffer of their own: what is kept must keep no more than itself in memory. */
function ownBytes(bytes: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
  return bytes.length === bytes.buffer.byteLength ? bytes : bytes.slice();
}

function concat(parts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  const whole = allocate(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) whole.set(part, at), at += part.length;
  return whole;
}

/**
 * Calls back after a time in milliseconds. Does not keep the process going: a listener does, or `HttpServer.#end`.
 * (`setTimeout` would: but Deno loads Node's timers with the first one, for 4 ms and 3 MB.)
 */
function after(time: number, callback: () => void): void {
  AbortSignal.timeout(time).onabort = callback;
}

/** Resolves after a time in milliseconds. */
function pause(time: number): Promise<void> {
  return new Promise((resolve) => after(time, resolve));
}

/** Does something that nobody waits for, nor minds if it fails. */
function inBackground(act: () => unknown): void {
  (async () => await act())().catch(() => {});
}

/** By time in milliseconds: what resolves when it is over, and until when others may wait for that, too. */
const PAUSES = new Map<number, { readonly over: Promise<undefined>; readonly shareable: number }>();

/** What a promise gives; undefined if that takes longer than a time in milliseconds, or nine tenths of it. */
async function within<T>(time: number, promise: Promise<T>): Promise<T | undefined> {
  const now = performance.now(), shared = PAUSES.get(time);
  if (shared !== undefined && now < shared.shareable) return await Promise.race([promise, shared.over]);
  const over = pause(time).then(() => void PAUSES.delete(time));
  PAUSES.set(time, { over, shareable: now + time / 10 });
  return await Promise.race([promise, over]);
}

/** How long work goes on before others are served, in milliseconds. */
const WORK_TIME = 8;
/** When the event loop last had its turn; the queue of work that waits; and how much that is. */
let workedSince = 0, workLine: Promise<unknown> = Promise.resolve(), waitingSteps = 0;

/** What takes long waits for this before each step of it: one step at a time, and others are served in between. */
async function yieldToOthers(): Promise<void> {
  if (waitingSteps === 0 && performance.now() - workedSince < WORK_TIME) return;
  waitingSteps++;
  await (workLine = workLine.then(() => pause(0)));
  waitingSteps--;
  workedSince = performance.now();
}

interface Entry<V> {
  readonly value: V;
  /** In bytes. */
  readonly size: number;
}

/** A cache limited in bytes, of two generations: when the recent half is full, the older half is dropped. */
class Cache<V> {
  readonly #limit: number;
  #recent = new Map<string, Entry<V>>();
  #older = new Map<string, Entry<V>>();
  /** Of the recent ones, in bytes. */
  #size = 0;

  constructor(size: number) {
    this.#limit = size / 2;
  }

  get(key: string): V | undefined {
    const recent = this.#recent.get(key);
    if (recent !== undefined) return recent.value;
    const older = this.#older.get(key);
    if (older !== undefined) this.set(key, older.value, older.size);
    return older?.value;
  }

  set(key: string, value: V, size: number): void {
    this.#delete(key);
    if (this.#size + size > this.#limit) [this.#older, this.#recent, this.#size] = [this.#recent, new Map(), 0];
    this.#recent.set(key, { value, size });
    this.#size += size;
  }

  /** Adds to the size of what is kept under a key. */
  grow(key: string, more: number): void {
    const value = this.get(key), entry = this.#recent.get(key);
    if (value !== undefined && entry !== undefined) this.set(key, value, entry.size + more);
  }

  #delete(key: string): void {
    this.#size -= this.#recent.get(key)?.size ?? 0;
    this.#recent.delete(key);
    this.#older.delete(key);
  }
}

/** Most results that `memoized` keeps. */
const MEMO_LIMIT = 256;

/** The same function, but it remembers its last results: for values that most clients send alike. */
function memoized<A, T>(make: (argument: A) => T): (argument: A) => T {
  const made = new Map<A, T>();
  let last: { readonly argument: A; readonly result: T } | undefined;
  return (argument) => {
    // Usually it is the same as the last time.
    if (last !== undefined && last.argument === argument) return last.result;
    let result = made.get(argument);
    if (result === undefined) {
      if (made.size >= MEMO_LIMIT) made.clear();
      made.set(typeof argument === "string" ? copyOf(argument) as A & string : argument, result = make(argument));
    }
    last = { argument, result };
    return result;
  };
}

/** A copy of a text: a part of a longer one would keep all of that in memory. */
function copyOf(text: string): string {
  return UTF8_DECODER.decode(UTF8_ENCODER.encode(text));
}

/** Makes a value when it is first asked for. */
function lazily<T>(make: () => T): () => T {
  let made: { readonly value: T } | undefined;
  return () => (made ??= { value: make() }).value;
}

// ── Log ──────────────────────────────────────────────────────────────────────────────────────────
// A line for each thing that happened. Lines are gathered and written together: no answer waits for the log.

/** Most text of the log that waits for a slow reader, in characters; what comes then is counted and dropped. */
const LOG_LIMIT = 4 * 1024 * 1024;
/** How long a server that ends waits for its last lines to be taken, in milliseconds. */
const LOG_CLOSE_TIME = 1000;
/** Most files whose detected charset is told. */
const DETECTIONS = 1000;
/** For how long lines are gathered, in milliseconds. */
const LOG_INTERVAL = 50;

/** Gathers lines and writes them together, whole lines at a time, while answers go on. */
class Log {
  readonly #form: Settings["log"];
  readonly #write: (lines: string) => void | Promise<unknown>;
  #lines = "";
  #dropped = 0;
  readonly #detected = new Set<string>();
  readonly #stamp = onceASecond(logDate);
  /** Whether what is gathered will be written without further ado. */
  #isTimed = false;
  #writing: Promise<unknown> | undefined;

  constructor(form: Settings["log"], write?: (lines: string) => void) {
    this.#form = form;
    this.#write = write ?? writeStandardError;
  }

  /** A request's head as it came, line by line behind the number of its connection. */
  request(connection: number, text: string): void {
    if (this.#form === "wire") this.append(wireLines(connection, ">", text));
  }

  /**
   * A response: a line of the Common or the Combined Log Format, the charset, and how many characters were lost, if
   * any were. Its head, as it went, stands before it if that is wanted.
   */
  response(exchange: Exchange, message: Message, head: string | Uint8Array, sent: number): void {
    if (this.#form === "none") return;
    const { status, charset, lost, reason } = message, bytes = exchange.method === "HEAD" || sent === 0 ? "-" : sent;
    if (this.#form === "wire") {
      this.append(wireLines(exchange.number, "<", typeof head === "string" ? head : headOf(head)));
    }
    const quoted = (name: string) => ` "${escapeWire(exchange.header(name) ?? "-").replace(/["\\]/g, "\\$&")}"`;
    const agent = this.#form === "combined" ? quoted("referer") + quoted("user-agent") : "";
    const rest = (lost ? ` lost=${lost}` : "") + (reason === undefined ? "" : ` reason="${escapeControls(reason)}"`);
    this.append(
      `${exchange.remote} - ${exchange.user} [${this.#stamp()}] "${exchange.requestLine}" ${status} ${bytes}${agent} "${
        charset ?? "-"
      }"${rest}\n`,
    );
  }

  /** What a file's text was detected to be in; once a file. */
  detection(path: string, encoding: string | undefined, isSure: boolean): void {
    if (this.#form === "none" || this.#detected.has(path) || this.#detected.size >= DETECTIONS) return;
    this.#detected.add(path);
    const found = encoding === undefined
      ? "its charset is not known"
      : isSure
      ? `read as ${encoding}`
      : `perhaps ${encoding}`;
    this.notice(`${path} declares no charset: ${found}`);
  }

  /** Something that whoever runs the server should know. */
  notice(text: string): void {
    this.append(`charserve: ${escapeControls(text)}\n`);
  }

  /** Whole lines, to be written with others. */
  append(lines: string): void {
    if (this.#lines.length > LOG_LIMIT) return void this.#dropped++;
    this.#lines += lines;
    if (!this.#isTimed) this.#flushLater();
  }

  #flushLater(): void {
    this.#isTimed = true;
    after(LOG_INTERVAL, () => this.#flush());
  }

  async #flush(): Promise<void> {
    const dropped = this.#dropped > 0 ? `charserve: ${this.#dropped} log entries were dropped\n` : "";
    const lines = this.#lines + dropped;
    [this.#lines, this.#dropped] = ["", 0];
    try {
      if (lines !== "") await (this.#writing = Promise.resolve(this.#write(lines)));
    } catch {
      // A log that nobody takes must not end the server.
    }
    this.#isTimed = false;
    if (this.#lines !== "") this.#flushLater();
  }

  /** Writes the last lines, unless whoever takes them is stuck. */
  async close(): Promise<void> {
    await within(LOG_CLOSE_TIME, this.#finish());
  }

  async #finish(): Promise<void> {
    await this.#writing?.catch(() => {});
    await this.#flush();
  }
}

/** A time as the Common Log Format has it. */
function logDate(time: number): string {
  const [, day, month, year, clock] = formatDate(time).split(" ");
  return `${day}/${month}/${year}:${clock} +0000`;
}

/** The head of a response that is bytes already. */
function headOf(bytes: Uint8Array): string {
  const text = latin1(bytes.subarray(0, HEAD_LIMIT));
  return text.slice(0, text.indexOf("\r\n\r\n") + 4);
}

/** A head, a line each: `>` from the client, `<` to it. Passwords are not shown. */
function wireLines(connection: number, direction: string, head: string): string {
  // Nor in a head that was refused, which may have a space before the colon, or go on in the next line.
  const shown = head.replace(/^((?:proxy-)?authorization[ \t]*:).*(?:\r?\n[ \t].*)*/gim, "$1 ***");
  return shown.replace(/\r\n$/, "").split("\r\n").map((line) => `[${connection}] ${direction} ${escapeWire(line)}\n`)
    .join("");
}

async function writeStandardError(lines: string): Promise<void> {
  const bytes = UTF8_ENCODER.encode(lines);
  for (let sent = 0; sent < bytes.length;) sent += await Deno.stderr.write(bytes.subarray(sent));
}

// ── Workers ──────────────────────────────────────────────────────────────────────────────────────
// Threads that share one port, each a server of its own: this module again, as a Web Worker.

/** How long to wait before a worker that died is replaced, the first time and at most, in milliseconds. */
const RESTART_DELAY = 200, LONGEST_RESTART_DELAY = 10_000;

/** What a worker tells the main thread. */
type WorkerReport =
  | { readonly kind: "listening"; readonly addr: Deno.NetAddr }
  | { readonly kind: "failed"; readonly reason: string }
  | { readonly kind: "log"; readonly lines: string }
  | { readonly kind: "stopped" };

/** A server of several threads that share one port: the system spreads connections over them. */
async function startWorkers(options: ServeOptions, count: number): Promise<Server> {
  /** The threads that run, and where each listens, once it does. */
  const workers = new Map<Worker, Deno.NetAddr | undefined>();
  const log = new Log("none"), stopped = Promise.withResolvers<void>();
  let draining = false;
  const start = async (port: number): Promise<Deno.NetAddr> => {
    const { worker, listening } = startWorker({ ...options, port }, log, () => {
      const addr = workers.get(worker);
      workers.delete(worker);
      if (draining && workers.size === 0) stopped.resolve();
      if (addr !== undefined) void replace(addr.port);
    });
    workers.set(worker, undefined);
    const addr = await listening;
    workers.set(worker, addr);
    return addr;
  };
  const replace = async (port: number) => {
    for (let delay = RESTART_DELAY;; delay = Math.min(2 * delay, LONGEST_RESTART_DELAY)) {
      await new Promise((resolve) => setTimeout(resolve, delay)); // Not `pause`: this may be all that goes on.
      if (draining) return;
      try {
        return void await start(port);
      } catch (error) {
        log.notice(`cannot replace a worker: ${(error as Error).message}`);
      }
    }
  };
  // The first one finds the port, if any will do.
  const addr = await start(options.port ?? DEFAULTS.port);
  await Promise.all(Array.from({ length: count - 1 }, () => start(addr.port)));
  const finished = stopped.promise.then(() => log.close());
  const shutdown = (grace: number = 0) => {
    draining = true;
    for (const worker of workers.keys()) worker.postMessage({ stop: grace });
    if (workers.size === 0) stopped.resolve();
    return finished;
  };
  return { addr, finished, pending: 0, shutdown, [Symbol.asyncDispose]: () => shutdown() };
}

/** Starts a thread. `listening` fails if it cannot; `onEnd` is called when it has stopped, or died. */
function startWorker(options: ServeOptions, log: Log, onEnd: () => void) {
  const { promise: listening, resolve, reject } = Promise.withResolvers<Deno.NetAddr>();
  const worker = new Worker(import.meta.url, { type: "module", name: "charserve" });
  const end = () => {
    worker.terminate();
    onEnd();
  };
  worker.onmessage = ({ data }: MessageEvent<WorkerReport>) => {
    if (data.kind === "log") log.append(data.lines);
    else if (data.kind === "listening") resolve(data.addr);
    else {
      if (data.kind === "failed") reject(new Error(data.reason));
      end();
    }
  };
  worker.onerror = (event) => {
    event.preventDefault();
    log.notice(`a worker died: ${event.message}`);
    reject(new Error(`a worker died: ${event.message}`));
    end();
  };
  worker.postMessage(options);
  return { worker, listening };
}

/** The other side: a thread that serves until it is told to stop. */
async function runWorker(): Promise<void> {
  const main = globalThis as unknown as Worker;
  const report = (message: WorkerReport) => main.postMessage(message);
  const { promise, resolve } = Promise.withResolvers<ServeOptions>();
  const stop = Promise.withResolvers<number>();
  main.onmessage = ({ data }) => "stop" in data ? stop.resolve(data.stop) : resolve(data);
  const options = await promise;
  try {
    const onLog = (lines: string) => report({ kind: "log", lines });
    const server = serve({ ...options, routes: routesFor(options), reusePort: true, onLog });
    report({ kind: "listening", addr: server.addr as Deno.NetAddr });
    await server.shutdown(await stop.promise);
    report({ kind: "stopped" });
  } catch (error) {
    report({ kind: "failed", reason: explainFailure(error, options) });
  }
}

/** Sharing a port is unstable in Deno, and a thread reads this module again. */
function checkWorkersAllowed(): void {
  // Deno ends the process when an unstable API is used without its flag: better to ask first.
  if (!("listenDatagram" in Deno)) throw new Error("--workers needs deno run --unstable-net");
  const { protocol } = new URL(import.meta.url);
  const path = new URL(import.meta.url);
  if (protocol === "file:" && Deno.permissions.querySync({ name: "read", path }).state !== "granted") {
    throw new Error("--workers needs deno run --allow-read, since each thread loads server.ts");
  }
}

// ── Options and command line ─────────────────────────────────────────────────────────────────────
// Each option is one row: how it is written, what it means, how it is read, what it starts as, and what it
// goes with. The command line, `--help` and the defaults of `serve()` follow from this table; README is held to it.

const VERSION = "0.1.0";

/** RFC 7617 §2: no colon in the name, no control characters. An empty password is most likely a mistake. */
const CREDENTIALS = /^[^:\p{Cc}]+:\P{Cc}+$/u;
/** How long the package that splits the arguments may take to come, in milliseconds. */
const PACKAGE_TIME = 2000;

interface Option {
  /** Title of the group that begins with this option. */
  readonly group?: string;
  /** How it is written, as `--help` shows it: `-p, --port <port>`; a switch has no `<value>`. */
  readonly usage: string;
  /** What it is; then, after semicolons, what its special values do. */
  readonly help: string;
  /** Makes the value of what was typed; throws `UsageError` that says what would have been right. Switches have none. */
  readonly read?: (text: string) => unknown;
  /** Its value when it is not given. */
  readonly initial?: unknown;
  /** May be given several times: its values make a list, or one record. */
  readonly many?: "list" | "record";
  /** What it has no effect without, and what it contradicts: other options, or ROOT. */
  readonly needs?: string;
  readonly excludes?: readonly string[];
  /** Its value must never be shown. */
  readonly secret?: boolean;
}

// deno-fmt-ignore
const OPTIONS = {
  body: { group: "What to serve", usage: "--body <text>", read: String, excludes: ["root"],
    help: "text that answers every GET, in place of ROOT; -: read it from standard input" },
  fallback: { usage: "--fallback <file>", read: String, needs: "root",
    help: "file of ROOT that answers for pages not found (single-page applications)" },
  noListing: { usage: "--no-listing", initial: false, needs: "root", help: "do not list folders" },
  dotfiles: { usage: "--dotfiles", initial: false, needs: "root", help: "serve names that begin with a dot" },
  followLinks: { usage: "--follow-links", initial: false, needs: "root",
    help: "symbolic links may lead out of ROOT" },
  type: { usage: "--type <.ext=type>", read: extensionType, many: "record", needs: "root",
    help: "media type of an extension: .log=text/plain; may be repeated" },

  charset: { group: "Charsets", usage: "-c, --charset <label>", read: encodingOption,
    help: "charset to send text in; without it, files keep theirs, and other text is UTF-8" },
  sourceCharset: { usage: "--source-charset <label>", read: orWord("auto", encodingOption), initial: "auto", needs: "root",
    help: "charset of files that do not say theirs" },
  declare: { usage: "--declare <label>", read: labelOption,
    help: "charset that Content-Type claims, true or not; none: claim nothing" },
  unmappable: { usage: "--unmappable <mode>", read: oneOf("auto", "html", "replacement", "fatal"), initial: "auto",
    help: "what becomes of a character that the charset lacks; html: &#N;, replacement: ?, fatal: 500; " +
      "auto: html in HTML and XML, replacement elsewhere" },

  port: { group: "Network", usage: "-p, --port <port>", read: integer(0, 65535), initial: 8000,
    help: "TCP port to listen on; 0: any free one" },
  host: { usage: "--host <address>", read: String, initial: "127.0.0.1",
    help: "address to listen on; 0.0.0.0 or :: lets other machines in" },
  unix: { usage: "--unix <path>", read: String, excludes: ["port", "host", "cert", "key", "workers"],
    help: "Unix socket to listen on, in place of a port" },
  cert: { usage: "--cert <file>", read: String, needs: "key", help: "certificate in PEM: speak HTTPS" },
  key: { usage: "--key <file>", read: String, needs: "cert", help: "private key of the certificate, in PEM" },
  workers: { usage: "--workers <n>", read: workerCount, initial: 1,
    help: "threads that share the port; auto: one a core" },

  allowHost: { group: "Access", usage: "--allow-host <name>", read: hostName, many: "list",
    help: "host name to answer to, besides the address listened on; *: any; may be repeated" },
  auth: { usage: "--auth <name:password>", read: credentials, many: "list", secret: true,
    help: "name and password to ask for; @file: read them from a file, one a line; may be repeated" },
  cors: { usage: "--cors", initial: false, help: "let scripts of other sites read the answers" },
  header: { usage: "--header <field>", read: fieldLine, many: "list",
    help: '"Name: value" to send with every answer; may be repeated' },
  trustProxy: { usage: "--trust-proxy", initial: false,
    help: "log the client that X-Forwarded-For or Forwarded names" },

  headerTimeout: { group: "Limits", usage: "--header-timeout <time>", read: duration, initial: 10_000,
    help: "longest wait for a request head" },
  idleTimeout: { usage: "--idle-timeout <time>", read: duration, initial: 60_000, help: "longest silence of a client" },
  maxConnections: { usage: "--max-connections <n>", read: integer(1, 1_000_000), initial: 1000,
    help: "most connections at once; the next one gets 503" },
  maxBody: { usage: "--max-body <size>", read: byteSize, initial: 2 ** 20, help: "longest content of a request" },

  log: { group: "The program", usage: "--log <form>", read: oneOf("common", "combined", "wire", "none"), initial: "common",
    help: "form of the log on standard error; common: Common Log Format, and the charset; " +
      "combined: Referer and User-Agent, too; wire: every head, > from the client, < to it; none: no log" },
  help: { usage: "-h, --help", initial: false, help: "show this and exit" },
  version: { usage: "-V, --version", initial: false, help: "show the version and exit" },
} satisfies Record<string, Option>;

type OptionName = keyof typeof OPTIONS;
type SettingOf<Row> = Row extends { read: (text: string) => infer Value }
  ? Row extends { many: "list" } ? readonly Value[] : Row extends { initial: unknown } | { many: "record" } ? Value
  : Value | undefined
  : boolean;
type Settings = { readonly [Name in OptionName]: SettingOf<(typeof OPTIONS)[Name]> };
type CommandLine = Settings & { readonly root: string | undefined };

/** The defaults of the table, as `serve()` starts from them. */
const DEFAULTS = Object.fromEntries(
  Object.entries<Option>(OPTIONS).map(([key, { many, initial }]) => [
    key,
    many === undefined ? initial : many === "list" ? [] : {},
  ]),
) as unknown as Settings;

/** The rows, with their keys and the ways to write them: `--port`, `-p`. */
const optionRows = lazily(() =>
  Object.entries<Option>(OPTIONS).map(([key, option]) => {
    const [long = "", short] = option.usage.replace(/ <.*/, "").split(", ").reverse();
    return { ...option, key: key as OptionName, long, short };
  })
);
type OptionRow = ReturnType<typeof optionRows>[number];

/** Reads `8`, `auto`: as many threads as there are cores. */
function workerCount(text: string): number {
  return text === "auto" ? navigator.hardwareConcurrency : integer(1, 256)(text);
}

/** Reads `10s`, `500ms`, `2m` or `10` (seconds). Returns milliseconds. */
function duration(text: string): number {
  const match = /^(\d{1,6}(?:\.\d{1,3})?)(ms|s|m)?$/.exec(text);
  const value = Number(match?.[1]) * { ms: 1, s: 1000, m: 60_000 }[match?.[2] as "ms" ?? "s"];
  if (value >= 1) return value;
  throw new UsageError(`expected a time such as 10s, 500ms or 2m`);
}

/** Reads `1MiB`, `64KiB` or `1000` (bytes). Returns bytes. */
function byteSize(text: string): number {
  const match = /^(\d{1,9})(KiB|MiB|GiB)?$/i.exec(text);
  if (match === null) throw new UsageError(`expected a size such as 1MiB, 64KiB or 1000`);
  const unit = { kib: 2 ** 10, mib: 2 ** 20, gib: 2 ** 30 }[match[2]?.toLowerCase() as "kib"] ?? 1;
  return Number(match[1]) * unit;
}

function orWord(word: string, read: (text: string) => string) {
  return (text: string): string => text === word ? word : read(text);
}

function hostName(text: string): string {
  if (text === "*" || HOST.test(text)) return text.toLowerCase().replace(/\.$/, "");
  throw new UsageError("expected a host name such as example.com, without a port, or *");
}

/** Reads `Name: value`. Framing is the server's own: its fields are refused. */
function fieldLine(text: string): Field {
  const { name, value } = FIELD_LINE.exec(text)?.groups ?? {};
  if (name === undefined || value === undefined) throw new UsageError('expected "Name: value"');
  if (FRAMING_FIELDS.has(name.toLowerCase())) throw new UsageError(`${name} is the server's to write`);
  return [name, value];
}

/** Reads `.log=text/plain`. */
function extensionType(text: string): Readonly<Record<string, string>> {
  const [, extension, type = ""] = /^(\.[^.=/\\\s]+)=(.*)$/s.exec(text) ?? [];
  if (extension !== undefined && MEDIA_TYPE.test(type)) return { [extension.toLowerCase()]: type.toLowerCase() };
  throw new UsageError("expected an extension and its type, such as .log=text/plain");
}

/** Reads `name:password`, or `@file`, whose lines are read at start. Errors do not repeat it. */
function credentials(text: string): string {
  if (CREDENTIALS.test(text) || /^@./s.test(text)) return text;
  throw new UsageError("expected name:password, neither of them empty, or @file");
}

/** The credentials in a file, one a line. A file without any would let everybody in: it is refused. */
async function readCredentials(path: string): Promise<readonly string[]> {
  const lines = (await Deno.readTextFile(path)).replace(/^\uFEFF/, "").split(/\r?\n/);
  const wrong = lines.findIndex((line) => line !== "" && !CREDENTIALS.test(line));
  if (wrong >= 0) throw new UsageError(`${path}, line ${wrong + 1}: expected name:password`);
  const given = lines.filter((line) => line !== "");
  if (given.length === 0) throw new UsageError(`${path}: expected name:password, one a line`);
  return given;
}

/** `--help`, from the table of options: 80 columns wide. */
function helpText(): string {
  const program = Deno.build.standalone
    ? Deno.execPath().split(/[/\\]/).at(-1)
    : "deno run --allow-net [--allow-read] server.ts";
  return `${program} [OPTIONS] [ROOT]

Serves ROOT, a folder or a file, with its text in any charset.
Without ROOT, serves the charset lab.
${optionRows().map(helpOf).join("")}`;
}

function helpOf({ group, usage, short, help, initial }: OptionRow): string {
  const shown = usage.includes("<time>")
    ? `${Number(initial) / 1000}s`
    : usage.includes("<size>")
    ? `${Number(initial) / 2 ** 20}MiB`
    : initial;
  const meaning = typeof shown === "boolean" || shown === undefined
    ? help
    : help.replace(/;|$/, ` (default ${shown})$&`);
  const lines = meaning.match(/\S.{0,46}(?!\S)/g)!;
  const title = group === undefined ? "" : `\n${group}:\n`;
  return title + `  ${short ? "" : "    "}${usage}`.padEnd(32) + lines.join("\n".padEnd(33)) + "\n";
}

/** What was typed: the options as they are written (`-p`, `--port`), with their values or "", and the other words. */
interface Typed {
  readonly options: readonly (readonly [flag: string, value: string])[];
  readonly words: readonly string[];
}

/** The part of `@std/cli/parse-args` that is used. */
interface ArgumentsPackage {
  parseArgs(args: readonly string[], options: {
    unknown: (argument: string, key: string | undefined, value: unknown) => unknown;
  }): { readonly _: readonly (string | number)[] };
}

/** Splits the arguments with `@std/cli`, or, where that is not to be had at once, without. */
async function splitArguments(args: readonly string[]): Promise<Typed> {
  // The name is put together here: a literal one Deno would fetch before the first line runs, and wait for the network.
  const module = "parse-args", loading = import(`jsr:@std/cli@^1/${module}`).catch(() => undefined);
  const loaded: ArgumentsPackage | undefined = await within(PACKAGE_TIME, loading), attached = attachValues(args);
  return loaded === undefined ? splitByHand(attached) : splitByPackage(loaded, attached);
}

function splitByPackage({ parseArgs }: ArgumentsPackage, attached: readonly string[]): Typed {
  const options: [string, string][] = [];
  const { _: words } = parseArgs(attached, {
    // Called for each option, since the package was told of none. Its key for `--no-listing=x` or `--body=` is another.
    unknown(argument, key, value) {
      const flag = argument.startsWith("--") ? argument.replace(/(?<=.{3})=.*/s, "") : `-${key}`;
      options.push([flag, typeof value === "string" ? value : ""]);
      return false;
    },
  });
  return { options, words: words.map(String) };
}

function splitByHand(attached: readonly string[]): Typed {
  const end = attached.indexOf("--");
  const options = attached.slice(0, end).map((argument) => {
    const [, flag = "", value = ""] = /^(--[^=]*|-.)=?(.*)$/su.exec(argument) ?? [];
    return [flag, value] as const;
  });
  return { options, words: attached.slice(end + 1) };
}

/**
 * Writes options with a value as `--name=value`, and other words last: `@std/cli` would take `-cgbk` for four
 * options, a value that begins with a hyphen for an option, and a word after a switch for its value.
 */
function attachValues(args: readonly string[]): string[] {
  const options: string[] = [], words: string[] = [], rest = [...args];
  const valued = optionRows().filter(({ read }) => read !== undefined);
  const letters = valued.map(({ short = "" }) => short.slice(1)).join("");
  const cluster = new RegExp(`^-([^-${letters}][^${letters}]*)([${letters}].*)?$`, "s");
  for (let argument; (argument = rest.shift()) !== undefined && argument !== "--";) {
    const text = argument, [, switches = "", last] = cluster.exec(text) ?? [];
    const row = valued.find(({ long, short }) => text === long || short && text.startsWith(short));
    const value = row === undefined || text === row.long ? "" : text.slice(2);
    // `-hVp80` is `-h -V -p80`.
    if (switches.length > 1 || last) rest.unshift(...[...switches, last ?? []].flat().map((letter) => `-${letter}`));
    else if (row === undefined) (/^-./s.test(text) ? options : words).push(text);
    else if (value !== "") options.push(`${row.long}=${value.replace(/^=/, "")}`);
    else options.push(rest.length > 0 ? `${row.long}=${rest.shift()}` : row.long);
  }
  return [...options, "--", ...words, ...rest];
}

/** Reads the arguments by the table. Throws `UsageError`. */
async function parseArguments(args: readonly string[]): Promise<CommandLine> {
  // Without arguments there is nothing to split, and nothing to load for that.
  const { options, words: [root, more] } = args.length === 0 ? { options: [], words: [] } : await splitArguments(args);
  const settings: Record<string, unknown> = { ...DEFAULTS, root }, given = new Set<string>();
  for (const [flag, text] of options) {
    const row = optionRows().find(({ long, short }) => flag === long || flag === short);
    if (row === undefined) {
      throw new UsageError(`unknown option ${flag}${didYouMean(flag, optionRows().map(({ long }) => long))}`);
    }
    const { key, long, many, read } = row, value = readValue(row, text);
    if (given.has(key) && read && !many) throw new UsageError(`${long} is given twice`);
    given.add(key);
    if (many === "list") settings[key] = [...settings[key] as unknown[], value];
    else settings[key] = many === "record" ? { ...settings[key] as object, ...value as object } : value;
  }
  if (more !== undefined) throw new UsageError(`expected one ROOT, not also "${more}"`);
  return settings as CommandLine;
}

/** The value of an option; what `read` throws is the user's mistake. */
function readValue({ key, long, read = readSwitch, secret }: OptionRow, text: string): unknown {
  // An empty text can be served.
  if (text === "" && read !== readSwitch && key !== "body") throw new UsageError(`${long} needs a value`);
  try {
    return read(text);
  } catch (error) {
    throw new UsageError(`${long}${secret ? "" : ` ${text}`}: ${(error as Error).message}`);
  }
}

/** A switch is on when it is given; `--name=false` is understood, too. */
function readSwitch(text: string): boolean {
  if (["", "true", "false"].includes(text)) return text !== "false";
  throw new UsageError("expected no value, or true, or false");
}

/** Refuses options that contradict each other, or do nothing without another. */
function checkTogether(settings: CommandLine): void {
  const initial: Record<string, unknown> = { ...DEFAULTS, root: undefined };
  const isGiven = (key: string) => settings[key as OptionName] !== initial[key];
  const nameOf = (key: string) => optionRows().find((row) => row.key === key)?.long ?? "a ROOT";
  for (const { long, needs, excludes = [] } of optionRows().filter(({ key }) => isGiven(key))) {
    if (needs !== undefined && !isGiven(needs)) throw new UsageError(`${long} needs ${nameOf(needs)}`);
    const other = excludes.find(isGiven);
    if (other !== undefined) throw new UsageError(`${long} and ${nameOf(other)} exclude each other: leave one out`);
  }
}

/** Addresses that a person can open. */
function urlsOf(addr: Deno.Addr, secure: boolean): string[] {
  if (addr.transport !== "tcp") return [`unix:${(addr as Deno.UnixAddr).path}`];
  const hosts = isAnyAddress(addr)
    ? ["localhost", ...(ownAddresses() ?? [])]
    : [addr.hostname === "127.0.0.1" ? "localhost" : addr.hostname];
  const scheme = secure ? "https" : "http";
  return hosts.map((host) => `${scheme}://${host.includes(":") ? `[${host}]` : host}:${addr.port}/`);
}

function isAnyAddress(addr: Deno.Addr): boolean {
  return addr.transport === "tcp" && (addr.hostname === "0.0.0.0" || addr.hostname === "::");
}

/** This machine's addresses; undefined without the permission to know them. */
function ownAddresses(): string[] | undefined {
  if (Deno.permissions.querySync({ name: "sys", kind: "networkInterfaces" }).state !== "granted") return undefined;
  return Deno.networkInterfaces().map(({ address }) => address)
    .filter((address) => !/^(?:127\.|::1$|fe80)/.test(address));
}

/** What went wrong at start, in one line that says what to do. */
function explainFailure(error: unknown, settings: ServeOptions | undefined): string {
  const { message } = error as Error, { unix, host, port } = settings ?? {};
  const place = unix ?? `${host}:${port}`, other = unix ? "--unix" : "--port, or 0 for any";
  const path = /^(.*) \(os error \d+\): \w+ '(.*)'$/s.exec(message);
  if (path !== null) return `${path[2]}: ${path[1]}`;
  if (error instanceof Deno.errors.AddrInUse) return `${place} is in use: choose another with ${other}`;
  if (error instanceof Deno.errors.AddrNotAvailable) {
    return `${host} is no address of this machine: choose one with --host`;
  }
  if (error instanceof Deno.errors.NotCapable) {
    return message.replace(/, run again with the (\S+) flag/, ": run deno with $1");
  }
  if (error instanceof Deno.errors.PermissionDenied) {
    return `not allowed to listen on ${place}${unix ? "" : ": ports below 1024 need rights"}`;
  }
  const isPem = error instanceof Deno.errors.InvalidData || message.includes("KeyMismatch");
  if (isPem) return `--cert and --key are not a certificate and its key, both in PEM and not encrypted (${message})`;
  if (error instanceof UsageError) return message;
  return /lookup/.test(message) ? `${host}: ${message}` : unix === undefined ? message : `${unix}: ${message}`;
}

async function main(args: readonly string[]): Promise<void> {
  let settings: CommandLine | undefined;
  try {
    settings = await parseArguments(args);
    if (settings.help) console.log(helpText());
    else if (settings.version) console.log(`charserve ${VERSION} (Deno ${Deno.version.deno})`);
    else await run(settings);
    // Without this, a package that never arrives would keep the process running.
    Deno.exit(0);
  } catch (error) {
    console.error(`charserve: ${escapeControls(explainFailure(error, settings))}`);
    Deno.exit(error instanceof UsageError ? 2 : 1);
  }
}

/** Serves until a signal ends it. */
async function run(settings: CommandLine): Promise<void> {
  const server = await start(settings);
  stopOnSignal(server);
  console.log(urlsOf(server.addr, settings.cert !== undefined).join("\n"));
  if (isAnyAddress(server.addr) && ownAddresses() === undefined) {
    console.error("charserve: add --allow-sys=networkInterfaces to see the addresses that other machines can use");
  }
  await server.finished;
}

/** Starts what the command line asks for. */
async function start(settings: CommandLine): Promise<Server> {
  checkTogether(settings);
  const { body, cert, key, auth, unix, workers } = settings;
  const options: ServeOptions = {
    ...settings,
    body: body === "-" ? await new Response(Deno.stdin.readable).text() : body,
    cert: cert && await Deno.readTextFile(cert),
    key: key && await Deno.readTextFile(key),
    auth: (await Promise.all(auth.map((text) => text.startsWith("@") ? readCredentials(text.slice(1)) : text))).flat(),
  };
  if (unix !== undefined) await removeStaleSocket(unix);
  if (workers === 1) return serve({ ...options, routes: routesFor(options) });
  checkWorkersAllowed();
  return await startWorkers(options, workers);
}

/** Without anything to serve, the lab is served. */
function routesFor({ root, body }: ServeOptions): readonly Route[] {
  return root === undefined && body === undefined ? LAB_ROUTES : [];
}

/** A socket file that a killed server left behind is removed; one that somebody listens on is not. */
async function removeStaleSocket(path: string): Promise<void> {
  try {
    (await Deno.connect({ transport: "unix", path })).close();
  } catch (error) {
    const isSocket = error instanceof Deno.errors.ConnectionRefused && (await Deno.lstat(path)).isSocket;
    if (isSocket) await Deno.remove(path);
  }
}

/** SIGINT and SIGTERM let answers under way finish; a second one does not wait. */
function stopOnSignal(server: Server): void {
  let asked = false;
  for (
    const signal of Deno.build.os === "windows"
      ? ["SIGINT", "SIGBREAK", "SIGHUP"] as const
      : ["SIGINT", "SIGTERM"] as const
  ) {
    Deno.addSignalListener(signal, () => {
      if (asked) Deno.exit(signal === "SIGTERM" ? 143 : 130);
      asked = true;
      void server.shutdown(signal === "SIGTERM" ? IDLE_GRACE : 0);
      const { pending } = server, answers = pending === 1 ? "1 answer" : `${pending} answers`;
      if (signal === "SIGINT" && pending > 0) {
        console.error(`charserve: waiting for ${answers}, Ctrl-C again stops now`);
      }
    });
  }
}

// A thread of `--workers` is this same module, started as a worker.
if (import.meta.main) await ("WorkerGlobalScope" in globalThis ? runWorker() : main(Deno.args));
